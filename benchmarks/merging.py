"""What merging a LoRA adapter into bf16 weights changes, at each token that the student writes.

    python benchmarks/merging.py STUDENT ADAPTER ROWS --rows 16 --max_new_tokens 64

Generation decodes with merged weights and training computes with unmerged ones, so KL(merged || unmerged) is how far the text on
which a step trains is off-policy. Both round to bf16 in each layer: how far either is from the same weights in fp32 says how much of
that is merging. STUDENT is loaded in bf16 and the adapter in fp32, as in training with `--bf16`; the text is sampled from the merged
student at temperature 1.
"""

import argparse
import json

import torch
from common import CUDA
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd.data.loading import load_rows
from gkd.models.lora import merged_lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("adapter")
    parser.add_argument("rows_file")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    args = parser.parse_args()
    device = "cuda" if CUDA else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.student, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.bfloat16).to(device)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    prompts = [row["prompt"] for row in load_rows(args.rows_file, "train").select(range(args.rows))]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True, "padding": True}
    inputs = tokenizer.apply_chat_template(prompts, **options).to(device)
    torch.manual_seed(0)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        with merged_lora(model):
            ids = model.generate(**inputs, do_sample=True, max_new_tokens=args.max_new_tokens)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, inputs["input_ids"].shape[1] :])], 1)
            merged = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
        unmerged = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
        with model.disable_adapter():
            plain = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
    with torch.no_grad():
        exact = model.float()(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    start = inputs["input_ids"].shape[1]
    written = (ids[:, start:] != tokenizer.pad_token_id) & (ids[:, start:] != tokenizer.eos_token_id)

    def mean_kl(first: torch.Tensor, second: torch.Tensor) -> float:
        return float((first.exp() * (first - second)).sum(-1)[:, start - 1 : -1][written].mean())

    pairs = {
        "merged || unmerged": (merged, unmerged),
        "merged || fp32": (merged, exact),
        "unmerged || fp32": (unmerged, exact),
        "unmerged || without the adapter": (unmerged, plain),
    }
    result = {"tokens": int(written.sum())} | {f"KL({name})": mean_kl(*pair) for name, pair in pairs.items()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
