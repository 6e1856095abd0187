"""The draw of λ: a pure function of seed and step."""

from gkd.data.batch import Source
from gkd.rollout.steps import draw_source


def test_ends_and_share():
    draws = [draw_source(7, step, 0.3, seq_kd=False) for step in range(4000)]
    assert 0.27 < sum(d is Source.ON_POLICY for d in draws) / len(draws) < 0.33
    assert all(draw_source(7, s, 0.0, True) is Source.TEACHER for s in range(200))
    assert all(draw_source(7, s, 0.0, False) is Source.DATASET for s in range(200))
    assert all(draw_source(7, s, 1.0, True) is Source.ON_POLICY for s in range(200))


def test_a_function_of_seed_and_step_alone():
    assert [draw_source(1, s, 0.5, True) for s in range(50)] == [draw_source(1, s, 0.5, True) for s in range(50)]
    assert [draw_source(1, s, 0.5, True) for s in range(50)] != [draw_source(2, s, 0.5, True) for s in range(50)]
