"""Teachers in other processes: how gkd serves one, and how it asks it, vLLM, SGLang and chat APIs."""
