"""What to do before a training, from a diagnosis: each piece of advice with the figure behind it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

# From where on advice is given; see docs/on_policy.md for what they were held against.
RESCUED = 0.3  # share of failed answers that the teacher still brings to an end
FALLS_BACK = 0.5  # share of errors behind which the teacher is no longer surprised
ACCEPTED = 0.6  # share of the student's own tokens that the teacher accepts; below, text is too poor to learn from
SOLVES = 0.5  # share of the teacher's own answers that pass
CUT = 0.2  # share of the teacher's answers that the limit cuts off
START = 2.0  # nats of forward KL at the first tokens of an answer, and that many times that of later ones
SHARPER = 1.2  # times the teacher's entropy


class Advice(NamedTuple):
    """`say`: what to do; `because`: the figure."""

    say: str
    because: str


def advice(diagnosis: dict[str, Any]) -> list[Advice]:
    """The advice that `gkd diagnose` prints. `diagnosis`: what it writes to diagnosis.json."""
    return [*_trouble(diagnosis), *_text(diagnosis), *_divergence(diagnosis), *_length(diagnosis)]


def _value(figures: dict[str, Any], name: str) -> float | None:
    return figures[name]["value"] if name in figures else None


def _trouble(diagnosis: dict[str, Any]) -> Iterator[Advice]:
    """What should be mended before any training."""
    student, teacher = diagnosis["student"]["figures"], diagnosis["teacher"]["figures"]
    if (metric := diagnosis["metric"]) is not None and (solved := _value(teacher, f"score/{metric}")) < SOLVES:
        yield Advice(
            "Tune the teacher on this task first: the student will not be better than it",
            f"the teacher's own answers pass in {solved:.0%} of rows",
        )
    for measure in ("perplexity", "bits per byte"):  # the latter with a teacher that has another tokenizer
        sides = (f"dataset/{side}_{measure.replace(' ', '_')}" for side in ("teacher", "student"))
        surprises = [_value(student, name) for name in sides]
        if None not in surprises and surprises[0] > surprises[1]:
            yield Advice(
                "Check that the teacher is tuned for these rows, or train with --seq_kd True on its own text",
                "it finds the data's answers less likely than the student does: {} {:.3g} against {:.3g}".format(
                    measure, *surprises
                ),
            )
    first, *later = diagnosis["positions"]["given"] or [{"forward_kl": 0.0}]
    rest = max((span["forward_kl"] for span in later), default=first["forward_kl"])
    if first["forward_kl"] > START and first["forward_kl"] > START * rest:
        yield Advice(
            "Compare the chat templates: the models seem to expect answers to begin differently (--chat_template_path, "
            "--chat_template_kwargs)",
            f"forward KL {first['forward_kl']:.2f} in the first 8 tokens of an answer, {rest:.2f} later",
        )
    if (cut := _value(teacher, "on_policy/truncated")) > CUT:
        yield Advice(
            "Raise --max_new_tokens, or look whether the teacher knows when to stop",
            f"the limit cuts off {cut:.0%} of the teacher's answers",
        )


def _text(diagnosis: dict[str, Any]) -> Iterator[Advice]:
    """Whose text to train on."""
    student = diagnosis["student"]["figures"]
    accepted, agreement = 1 - _value(student, "on_policy/loss"), _value(student, "on_policy/agreement")
    if accepted < ACCEPTED:
        yield Advice(
            "Warm the student up by supervised KD first: --lmbda 0 --beta 0",
            f"as a draft, the teacher accepts {accepted:.0%} of the student's tokens; they agree on {agreement:.0%}",
        )
    rescue, fallen = diagnosis["rescue"], diagnosis["errors"]["falls_back"]["value"]
    if rescue is not None and rescue["failed"]:
        helps, because = (
            rescue["rate"] >= RESCUED,
            (
                f"behind the first error, the teacher still brings {rescue['rate']:.0%} [{rescue['low']:.0%}, "
                f"{rescue['high']:.0%}] of {rescue['failed']} failed answers to a right end"
            ),
        )
    elif rescue is None and fallen is not None:  # there were errors
        helps, because = (
            fallen >= FALLS_BACK,
            (
                f"the teacher's surprise falls back behind {fallen:.0%} of the student's errors; a verifier would tell "
                "more (--metrics, --scorer)"
            ),
        )
    else:
        return
    if helps:
        # On its own text alone a student that could gain much has lost everything: experiments/RESULTS.md.
        yield Advice("Train on the student's own text half of the time: --lmbda 0.5", because)
    else:
        # With a teacher that mends nothing it still gained: a student learns not to err (experiments/RESULTS.md).
        yield Advice("Let the run find out whether the student's own text pays: --lmbda auto", because)


def _divergence(diagnosis: dict[str, Any]) -> Iterator[Advice]:
    student = diagnosis["student"]["figures"]
    own, teachers = _value(student, "on_policy/student_entropy"), _value(student, "on_policy/teacher_entropy")
    because = f"on its own text the student's entropy is {own:.2f} nats, the teacher's {teachers:.2f}"
    if own > SHARPER * teachers:
        yield Advice("If answers will be sampled: --beta 0.5 to 1, which makes the student narrower", because)
    elif teachers > SHARPER * own:
        yield Advice("--beta 0 to 0.5: the student is narrower than its teacher already", because)


def _length(diagnosis: dict[str, Any]) -> Iterator[Advice]:
    student, teacher = diagnosis["student"], diagnosis["teacher"]
    cut, teachers_cut = (_value(side["figures"], "on_policy/truncated") for side in (student, teacher))
    longest = teacher["lengths"]["p99"]
    if teachers_cut <= CUT and longest < 0.6 * diagnosis["max_new_tokens"]:
        room = -(-int(1.2 * longest) // 16) * 16
        yield Advice(
            f"--max_new_tokens {room} is enough, and keeps a student that does not stop from taking the time",
            f"99 % of the teacher's answers end within {longest:.0f} tokens; the student's limit cut off {cut:.0%}",
        )
