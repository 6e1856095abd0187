"""The divergence of two rows of logits and its gradient, as one Triton kernel that reads each logit once.

The formulas are those of `gkd.losses.divergences.statistics_and_gradient`; tests compare the two. The kernel differs in
where it keeps numbers. A row of 128,256 fp32 logits of two models is 1 MiB, too much for one multiprocessor, so the
usual kernel reads it three times (normalizers, divergence, gradient). Here a team of programs shares a row: each keeps
its slice in registers from the first load to the gradient, and between the phases the team exchanges a dozen partial
sums through memory.

The exchange waits for the slowest program, so all programs of a team must run at once. Programs start in the order of
their numbers, and a team's numbers are consecutive: the first unfinished team runs completely, or will as soon as the
teams before it have finished. So there is no deadlock if one team fits on the device, which `supports` checks.
"""

import logging
import math
from functools import lru_cache

import torch

from gkd.io.errors import first_line

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it; gkd.losses.divergences then computes the same in torch
    triton = None

# The logits of each model that a program keeps in registers: 64 of the 128 registers of a thread.
SLICE = 8192
WARPS = 8
PROGRAMS_PER_MULTIPROCESSOR = 2
_FIELDS = 11  # numbers that a program sends to its team in one exchange

_broken = False  # whether the kernel failed to build or run here, see `give_up`


def supports(device: torch.device, vocab_size: int) -> bool:
    """Whether a team for rows of `vocab_size` logits runs on this device."""
    if triton is None or device.type != "cuda" or _broken:
        return False
    return triton.cdiv(vocab_size, SLICE) <= _slots(device)


def give_up(error: Exception) -> None:
    """Switches the kernel off for this process, such as when Triton, which builds it at first use, lacks a compiler."""
    global _broken
    _broken = True
    logging.getLogger(__name__).warning(
        "The Triton kernel of the divergence can't run here, so PyTorch computes it, which is slower: "
        f"{type(error).__name__}: {first_line(error)}"
    )


@lru_cache
def _slots(device: torch.device) -> int:
    """How many programs run at once on a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_MULTIPROCESSOR


if triton is not None:

    @triton.jit
    def _exp2(x, CUDA: tl.constexpr):
        if CUDA:  # one instruction where tl.exp2 takes four to keep results below 2^-126, which round to 0 here
            return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        else:
            return tl.exp2(x)

    @triton.jit
    def _log2(x, CUDA: tl.constexpr):
        if CUDA:  # an absolute error of 2^-22 near 1
            return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        else:
            return tl.log2(x)

    @triton.jit
    def _logits(ptr, bias_ptr, columns, inside, scale, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
        lowest = -1e30  # replaces -inf and pads the row: finite, so that no inf - inf arises, and of weight 0
        z = tl.load(ptr + columns, mask=inside, other=lowest).to(tl.float32)
        if BIAS:
            z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if SOFTCAP:
            z = softcap * (2 * tl.sigmoid(2 * scale * z / softcap) - 1)  # softcap · tanh(scale · z / softcap)
            z = tl.where(inside, z, lowest)
        else:
            z *= scale
        return tl.maximum(z, lowest)

    @triton.jit
    def _add6(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
        return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5

    @triton.jit
    def _max2(a0, a1, b0, b1):
        return tl.maximum(a0, b0), tl.maximum(a1, b1)

    @triton.jit
    def _add2(a0, a1, b0, b1):
        return a0 + b0, a1 + b1

    @triton.jit
    def _meet(counter, expected, CUDA: tl.constexpr):
        """Waits until `expected` programs have arrived; all that they stored before is visible then."""
        tl.debug_barrier()
        if CUDA:  # one thread counts and polls; the others wait at the barrier, where they take no issue slots
            meet: tl.constexpr = """{
                .reg .pred other, early; .reg .u32 thread; .reg .s32 count;
                mov.u32 thread, %tid.x;
                setp.ne.u32 other, thread, 0;
                @other bra DONE;
                red.release.gpu.global.add.s32 [$1], 1;
                WATCH:
                ld.acquire.gpu.global.s32 count, [$1];
                setp.lt.s32 early, count, $2;
                @early bra WATCH;
                DONE:
                mov.u32 $0, thread;
            }"""
            tl.inline_asm_elementwise(meet, "=r,l,r", [counter.to(tl.int64), expected], tl.int32, False, 1)
        else:
            tl.atomic_add(counter, 1, sem="release", scope="gpu")
            while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < expected:
                pass
        tl.debug_barrier()

    @triton.jit
    def _prefetch(ptr, offsets, CUDA: tl.constexpr):
        """Brings cache lines into L2 for the loads of the next row."""
        if CUDA:
            address = (ptr + offsets).to(tl.int64)
            tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], tl.int32, False, 1)

    @triton.jit
    def _of_team(board, field, members, TEAM: tl.constexpr, fill):
        return tl.load(board + field * TEAM + members, mask=members < TEAM, other=fill, cache_modifier=".cg")

    @triton.jit
    def divergence_kernel(
        student_ptr,  # (n, V) raw outputs of the head, row stride given
        teacher_ptr,  # (n, V)
        student_bias_ptr,  # (V,)
        teacher_bias_ptr,  # (V,)
        labels_ptr,  # (n,) int64
        grad_ptr,  # (n, V): d loss / d student output
        statistics_ptr,  # (6, statistics_stride) fp32, this chunk's columns
        boards_ptr,  # (teams, 2, FIELDS, TEAM) fp32: the numbers that a team's programs exchange
        counters_ptr,  # (teams,) int32, zero: arrivals
        rows,
        vocab,
        student_stride,
        teacher_stride,
        grad_stride,
        statistics_stride,
        student_scale,
        teacher_scale,
        student_softcap,
        teacher_softcap,
        temperature,
        beta,
        log2_beta,
        kd_ratio,
        MODE: tl.constexpr,  # 0: forward KL, 1: reverse KL, 2: generalized JSD
        STUDENT_SOFTCAP: tl.constexpr,
        TEACHER_SOFTCAP: tl.constexpr,
        STUDENT_BIAS: tl.constexpr,
        TEACHER_BIAS: tl.constexpr,
        CROSS_ENTROPY: tl.constexpr,
        GRADIENT: tl.constexpr,
        CUDA: tl.constexpr,
        TEAM: tl.constexpr,
        TEAM_2: tl.constexpr,  # TEAM rounded up to a power of two
        FIELDS: tl.constexpr,
        SLICE: tl.constexpr,
    ):
        # torch.compile passes Python floats as fp64
        student_scale = tl.cast(student_scale, tl.float32)
        teacher_scale = tl.cast(teacher_scale, tl.float32)
        student_softcap = tl.cast(student_softcap, tl.float32)
        teacher_softcap = tl.cast(teacher_softcap, tl.float32)
        temperature = tl.cast(temperature, tl.float32)
        beta = tl.cast(beta, tl.float32)
        log2_beta = tl.cast(log2_beta, tl.float32)
        kd_ratio = tl.cast(kd_ratio, tl.float32)
        log2_e = 1.4426950408889634
        ln_2 = 0.6931471805599453
        # Logits are kept in units of log2, at the temperature of the divergence.
        to_log2 = log2_e / temperature
        if not STUDENT_SOFTCAP:
            student_scale *= to_log2
        if not TEACHER_SOFTCAP:
            teacher_scale *= to_log2

        # Factor of the gradient, from log2 units at the temperature to the head's output in nats.
        to_raw = student_scale * (ln_2 / temperature if STUDENT_SOFTCAP else ln_2 / (temperature * to_log2))

        team = tl.program_id(0) // TEAM
        member = tl.program_id(0) % TEAM
        teams = tl.num_programs(0) // TEAM
        counter = counters_ptr + team
        columns = member * SLICE + tl.arange(0, SLICE)
        inside = columns < vocab
        lines = tl.minimum(member * SLICE + tl.arange(0, SLICE // 32) * 32, vocab - 1)  # 128 bytes of fp32
        members = tl.arange(0, TEAM_2)
        met = 0  # the number of exchanges of this team so far
        lowest = -1e30

        for row in range(team, rows, teams):
            start = tl.cast(row, tl.int64)
            zs = _logits(
                student_ptr + start * student_stride, student_bias_ptr, columns, inside,
                student_scale, student_softcap, STUDENT_BIAS, STUDENT_SOFTCAP,
            )  # fmt: skip
            zt = _logits(
                teacher_ptr + start * teacher_stride, teacher_bias_ptr, columns, inside,
                teacher_scale, teacher_softcap, TEACHER_BIAS, TEACHER_SOFTCAP,
            )  # fmt: skip
            following = tl.cast(tl.minimum(row + teams, rows - 1), tl.int64)
            _prefetch(student_ptr + following * student_stride, lines, CUDA)
            _prefetch(teacher_ptr + following * teacher_stride, lines, CUDA)
            if STUDENT_SOFTCAP:
                bent = zs / student_softcap  # for the gradient
                zs = tl.maximum(zs * to_log2, lowest)
            if TEACHER_SOFTCAP:
                zt = tl.maximum(zt * to_log2, lowest)

            # ---- phase 1: normalizers, expectations of the logits, agreement of both models' largest logits
            board = boards_ptr + (team * 2 + met % 2) * FIELDS * TEAM
            top_s, top_t = tl.reduce((zs, zt), 0, _max2)
            same = tl.max(((zs == top_s) & (zt == top_t)).to(tl.int32), axis=0)
            gap = zt - zs
            if CROSS_ENTROPY:  # always at temperature 1
                label = tl.load(labels_ptr + row)
                sum_1 = tl.sum(_exp2((zs - top_s) * temperature, CUDA), axis=0)
                at_label = tl.sum(tl.where(columns == label, zs * temperature, 0.0), axis=0)
                tl.store(board + 9 * TEAM + member, sum_1)
                tl.store(board + 10 * TEAM + member, at_label)
            ws = _exp2(zs - top_s, CUDA)
            wt = _exp2(zt - top_t, CUDA)
            sum_s, dot_s, gap_s, sum_t, dot_t, gap_t = tl.reduce(
                (ws, ws * (zs - top_s), ws * gap, wt, wt * (zt - top_t), wt * gap), 0, _add6
            )
            tl.store(board + 0 * TEAM + member, top_s)
            tl.store(board + 1 * TEAM + member, sum_s)
            tl.store(board + 2 * TEAM + member, dot_s)
            tl.store(board + 3 * TEAM + member, gap_s)
            tl.store(board + 4 * TEAM + member, top_t)
            tl.store(board + 5 * TEAM + member, sum_t)
            tl.store(board + 6 * TEAM + member, dot_t)
            tl.store(board + 7 * TEAM + member, gap_t)
            tl.store(board + 8 * TEAM + member, same.to(tl.float32))
            met += 1
            _meet(counter, met * TEAM, CUDA)

            tops_s = _of_team(board, 0, members, TEAM, lowest)
            sums_s = _of_team(board, 1, members, TEAM, 0.0)
            dots_s = _of_team(board, 2, members, TEAM, 0.0)
            gaps_s = _of_team(board, 3, members, TEAM, 0.0)
            tops_t = _of_team(board, 4, members, TEAM, lowest)
            sums_t = _of_team(board, 5, members, TEAM, 0.0)
            dots_t = _of_team(board, 6, members, TEAM, 0.0)
            gaps_t = _of_team(board, 7, members, TEAM, 0.0)
            sames = _of_team(board, 8, members, TEAM, 0.0)
            if CROSS_ENTROPY:
                sums_1 = _of_team(board, 9, members, TEAM, 0.0)
                at_labels = _of_team(board, 10, members, TEAM, 0.0)
            max_s, max_t = tl.reduce((tops_s, tops_t), 0, _max2)
            agreement = tl.max(tl.where((tops_s == max_s) & (tops_t == max_t), sames, 0.0), axis=0)
            factor_s = tl.exp2(tops_s - max_s)
            factor_t = tl.exp2(tops_t - max_t)
            norm_s, dot_s, gap_s, norm_t, dot_t, gap_t = tl.reduce(
                (
                    factor_s * sums_s,
                    factor_s * (dots_s + (tops_s - max_s) * sums_s),
                    factor_s * gaps_s,
                    factor_t * sums_t,
                    factor_t * (dots_t + (tops_t - max_t) * sums_t),
                    factor_t * gaps_t,
                ),
                0,
                _add6,
            )
            log_norm_s = tl.log2(norm_s)
            log_norm_t = tl.log2(norm_t)
            entropy_s = log_norm_s - dot_s / norm_s
            entropy_t = log_norm_t - dot_t / norm_t
            shift = max_t + log_norm_t - max_s - log_norm_s  # the difference of the normalizers
            forward_kl = gap_t / norm_t - shift
            reverse_kl = shift - gap_s / norm_s

            # ---- phase 2: the divergence, from the same registers
            ps = ws * (tl.exp2(top_s - max_s) / norm_s)
            pt = wt * (tl.exp2(top_t - max_t) / norm_t)
            d = gap - shift  # log2 of p_t / p_s
            if MODE == 0:
                divergence = forward_kl
                grad = (ps - pt) * (to_raw / ln_2)
            elif MODE == 1:
                divergence = reverse_kl
                grad = ps * (-d - reverse_kl) * to_raw
            else:
                board = boards_ptr + (team * 2 + met % 2) * FIELDS * TEAM
                # log2 of m / p_s. The second form is exact where the first would overflow.
                ratio = _exp2(tl.minimum(d, 120.0), CUDA)
                over = tl.maximum(_log2((1 - beta) + beta * ratio, CUDA), d + log2_beta)
                student_kl, teacher_kl = tl.reduce((-ps * over, pt * (d - over)), 0, _add2)
                tl.store(board + member, student_kl)
                tl.store(board + TEAM + member, teacher_kl)
                met += 1
                _meet(counter, met * TEAM, CUDA)
                student_kl, teacher_kl = tl.reduce(
                    (_of_team(board, 0, members, TEAM, 0.0), _of_team(board, 1, members, TEAM, 0.0)), 0, _add2
                )
                divergence = beta * teacher_kl + (1 - beta) * student_kl
                grad = ps * (over + student_kl) * ((beta - 1) * to_raw)

            loss = divergence * ln_2
            if CROSS_ENTROPY:
                norm_1 = tl.sum(tl.exp2((tops_s - max_s) * temperature) * sums_1, axis=0)
                lse_1 = max_s * temperature + tl.log2(norm_1)
                cross_entropy = (lse_1 - tl.sum(at_labels, axis=0)) * ln_2
                loss = kd_ratio * loss + (1 - kd_ratio) * cross_entropy
            if GRADIENT:
                if CROSS_ENTROPY:
                    hot = tl.where(columns == label, 1.0, 0.0)
                    p1 = _exp2(zs * temperature - lse_1, CUDA)
                    grad = kd_ratio * grad + (1 - kd_ratio) * (to_raw * temperature / ln_2) * (p1 - hot)
                if STUDENT_SOFTCAP:
                    grad *= 1 - bent * bent
                tl.store(grad_ptr + start * grad_stride + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)
            if member == 0:
                out = statistics_ptr + row
                tl.store(out, loss)
                tl.store(out + statistics_stride, forward_kl * ln_2)
                tl.store(out + 2 * statistics_stride, reverse_kl * ln_2)
                tl.store(out + 3 * statistics_stride, entropy_s * ln_2)
                tl.store(out + 4 * statistics_stride, entropy_t * ln_2)
                tl.store(out + 5 * statistics_stride, agreement)


def launch(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    grad: torch.Tensor | None,
    statistics: torch.Tensor,
    beta: float,
    temperature: float,
    kd_ratio: float,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> None:
    """Fills `statistics` and, if given, `grad`.

    Args:
        student, teacher: outputs of the heads before bias, scale and softcap, (n, V) in bf16, fp16 or fp32; the last
            dimension is contiguous.
        labels: int64 (n,); read when `kd_ratio < 1`.
        grad: (n, V), receives d loss / d `student`; any float dtype, may be `student` itself.
        statistics: fp32 (6, n) in the order of `gkd.losses.divergences.TokenStatistics`; may be columns of a larger tensor.
    """
    rows, vocab = student.shape
    team = triton.cdiv(vocab, SLICE)
    device = student.device
    slots = _slots(device) if device.type == "cuda" else team
    teams = max(1, min(rows, slots // team))
    boards = torch.empty(teams * 2 * _FIELDS * team, dtype=torch.float32, device=device)
    counters = torch.zeros(teams, dtype=torch.int32, device=device)
    cuda = device.type == "cuda" and torch.version.hip is None
    registers = 65536 // (PROGRAMS_PER_MULTIPROCESSOR * WARPS * 32) // 8 * 8  # handed out in eights
    tensors = student, teacher, student_bias, teacher_bias, labels, grad, statistics, boards, counters
    strides = [0 if matrix is None else matrix.stride(0) for matrix in (student, teacher, grad, statistics)]
    heads = student_scale, teacher_scale, student_softcap or 1.0, teacher_softcap or 1.0
    loss = temperature, beta, math.log2(beta) if beta > 0 else 0.0, kd_ratio
    divergence_kernel[(teams * team,)](
        *tensors,
        rows,
        vocab,
        *strides,
        *heads,
        *loss,
        MODE=0 if beta == 0.0 else 1 if beta == 1.0 else 2,
        STUDENT_SOFTCAP=student_softcap is not None,
        TEACHER_SOFTCAP=teacher_softcap is not None,
        STUDENT_BIAS=student_bias is not None,
        TEACHER_BIAS=teacher_bias is not None,
        CROSS_ENTROPY=kd_ratio < 1.0,
        GRADIENT=grad is not None,
        CUDA=cuda,
        TEAM=team,
        TEAM_2=triton.next_power_of_2(team),
        FIELDS=_FIELDS,
        SLICE=SLICE,
        num_warps=WARPS,
        **({"maxnreg": registers} if cuda else {}),
    )
