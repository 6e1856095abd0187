"""What convert_data.py is made of: files -> rows -> messages -> chosen rows -> a file, one row in memory at a time."""
