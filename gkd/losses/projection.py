"""Projects hidden states to logits, and gradients back, a chunk at a time."""

from collections.abc import Callable

import torch

from gkd.models.heads import LogitHead, widened

# From hidden states (n, H) to logits (n, V).
Projection = Callable[[torch.Tensor], torch.Tensor]
BYTES_PER_LOGIT = 4 + 4 + 2  # both models' logits in fp32, and the gradient in bf16

# The memory of a chunk of logits. On a CPU about as much as its caches hold.
CHUNK_BYTES = {"cuda": 960 * 2**20, "cpu": 64 * 2**20}


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """The number of positions in a chunk, so that memory does not grow with the vocabulary."""
    rows = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (vocab_size * BYTES_PER_LOGIT)
    # Kernels cut matrix products into tiles of 128 or 256 rows.
    return max(rows // 256 * 256, 128) if rows >= 128 else max(rows, 16)


class Projected:
    """A head for one call of the loss: projects chunks of hidden states, and computes the gradients to them.

    For a plain linear head, products go into one buffer for all chunks, in fp32 on CUDA. Any other module (LoRA,
    quantized) is called, and autograd gives its gradients.
    """

    def __init__(self, head: LogitHead, hidden: torch.Tensor, vocab_size: int, rows: int, params=()):
        self.head, self.vocab_size, self.params = head, vocab_size, params
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        self.context = torch.autocast(device, enabled=autocast)
        self.weight = self.bias = None
        linear = head.linear
        if linear is not None and all(any(p is q for q in linear) for p in params):
            weight, bias = (None if p is None else p.detach() for p in linear)
            self.dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
            self.weight = weight[:vocab_size].to(self.dtype)  # (V, H)
            self.bias = None if bias is None else bias[:vocab_size]
            wide = device == "cuda" and self.dtype in (torch.bfloat16, torch.float16)
            self.out = {"out_dtype": torch.float32} if wide else {}
            self.logits = hidden.new_empty(rows, vocab_size, dtype=torch.float32 if wide else self.dtype)

    def project(self, hidden: torch.Tensor, gradient: bool) -> torch.Tensor:
        """(n, H) -> (n, V), the head's output before scale and softcap, and before the bias of a plain linear head."""
        if self.weight is not None:
            self.states = hidden.to(self.dtype)
            raw = self.logits[: len(hidden)]
            with torch.autocast(hidden.device.type, enabled=False):
                torch.mm(self.states, self.weight.T, **self.out, out=raw)
            return raw
        with torch.set_grad_enabled(gradient), self.context:
            self.states = hidden.detach().requires_grad_(gradient)
            self.raw = self.head.raw(self.states)[..., : self.vocab_size]
        return self.raw.detach()

    def finish(self, raw: torch.Tensor) -> torch.Tensor:
        """Logits from the output of `project`: applies bias, scale and softcap in fp32."""
        return self.head.finish(raw if self.bias is None else widened(raw) + self.bias)

    def backward(self, grad: torch.Tensor, hidden_grad: torch.Tensor, param_grads: list[torch.Tensor]) -> None:
        """From d loss / d raw (n, V), writes d loss / d hidden to `hidden_grad` and adds to `param_grads`."""
        if self.weight is None:
            grads = torch.autograd.grad(self.raw, [self.states, *self.params], grad.to(self.raw.dtype))
            hidden_grad.copy_(grads[0])
            for total, part in zip(param_grads, grads[1:], strict=True):
                total += part
            return
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.to(self.dtype)
            if hidden_grad.dtype == self.dtype:
                torch.mm(grad, self.weight, out=hidden_grad)
            else:
                hidden_grad.copy_(grad @ self.weight)
            weight, _ = self.head.linear
            for parameter, whole in zip(self.params, param_grads, strict=True):
                total = whole[: self.vocab_size]
                if parameter is not weight:
                    total += grad.sum(0, dtype=total.dtype)
                elif total.dtype != grad.dtype and grad.device.type == "cuda":  # rounds no product to `grad`'s dtype
                    torch.addmm(total, grad.T, self.states, out_dtype=total.dtype, out=total)
                else:
                    total.addmm_(grad.T.to(total.dtype), self.states.to(total.dtype))
