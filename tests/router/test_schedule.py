import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticore.router import (
    TEMPERATURE_SCHEDULES,
    CosineTemperature,
    ExponentialTemperature,
    temperature_schedule,
)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1.5),
        (45, 1.25 + 0.25 * math.sqrt(0.5)),  # 1 + 0.5 (1 + cos(π/4)) / 2 = 1.426777
        (90, 1.25),
        (135, 1.25 - 0.25 * math.sqrt(0.5)),  # 1.073223
        (179, 1.0000380762),  # 1 + 0.25 (1 + cos(179π/180)), 1 + cos = 1.5230484e-4
        (180, 1.0),
        (299, 1.0),
        (1000, 1.0),
    ],
)
def test_cosine_over_the_official_300_steps(step, expected):
    assert CosineTemperature()(step, 300) == pytest.approx(expected, abs=1e-9)


def test_cosine_ends_exactly():
    assert CosineTemperature()(0, 300) == 1.5
    assert CosineTemperature()(180, 300) == 1.0
    assert CosineTemperature()(1, 1) == 1.0


def test_cosine_rounds_its_length_up_in_decimals():
    # ceil(0.6 * 7) = ceil(4.2) = 5; 0.07 * 100 is 7 (and 7.000000000000001 in floats).
    assert CosineTemperature()(4, 7) > 1.0
    assert CosineTemperature()(5, 7) == 1.0
    assert 0.07 * 100 > 7
    assert CosineTemperature(fraction=0.07)(6, 100) > 1.0
    assert CosineTemperature(fraction=0.07)(7, 100) == 1.0
    assert CosineTemperature(fraction=0)(0, 100) == 1.0


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1.5),
        (50, 1.3572561),  # 1.5 exp(-0.1)
        (150, 1.1112273),  # 1.5 exp(-0.3)
        (202, 1.0014662),  # 1.5 exp(-0.404); ln(1.5) / 0.6 * 300 = 202.73 steps to 1.0
        (203, 1.0),
        (300, 1.0),
    ],
)
def test_exponential_in_progress(step, expected):
    assert ExponentialTemperature()(step, 300) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 5.0), (1, 2.7440582), (2, 1.5059711), (3, 0.8264944), (4, 0.5)]
)
def test_exponential_in_steps(step, expected):
    schedule = ExponentialTemperature(start=5.0, end=0.5, unit="step")
    assert schedule(step, 300) == pytest.approx(expected, abs=1e-6)  # max(0.5, 5 exp(-0.6 step))


@pytest.mark.parametrize("schedule", [CosineTemperature(), ExponentialTemperature()])
@given(step=st.integers(0, 10_000), max_steps=st.integers(1, 9_000))
def test_temperature_never_rises_and_stays_in_range(schedule, step, max_steps):
    now, later = schedule(step, max_steps), schedule(step + 1, max_steps)
    assert 1.0 <= later <= now <= 1.5


@pytest.mark.parametrize(
    "schedule",
    [
        CosineTemperature(2.0, 0.5, 0.25),
        ExponentialTemperature(3.0, 0.1, 2.0),
        ExponentialTemperature(unit="step"),
    ],
)
def test_name_and_json_describe_a_schedule(schedule):
    options = json.loads(json.dumps(dataclasses.asdict(schedule)))
    assert temperature_schedule(schedule.name, **options) == schedule


def test_registry():
    assert set(TEMPERATURE_SCHEDULES) == {"cosine", "exponential"}
    assert temperature_schedule("cosine") == CosineTemperature()
    assert temperature_schedule("exponential", rate=0.1) == ExponentialTemperature(rate=0.1)
    with pytest.raises(ValueError, match=r"one of \['cosine', 'exponential'\], got 'linear'"):
        temperature_schedule("linear")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosineTemperature(start=0), "start must be finite and above 0, got 0"),
        (lambda: CosineTemperature(end=math.nan), "end must be finite and above 0, got nan"),
        (lambda: CosineTemperature(start=0.5), "start must be at least end"),
        (lambda: CosineTemperature(fraction=1.5), "fraction must be from 0 to 1, got 1.5"),
        (lambda: ExponentialTemperature(rate=-1), "rate must be finite and at least 0, got -1"),
        (lambda: ExponentialTemperature(unit="epoch"), "unit must be 'progress' or 'step'"),
        (lambda: CosineTemperature()(-1, 10), "step must be at least 0, got -1"),
        (lambda: ExponentialTemperature()(0, 0), "max_steps must be at least 1, got 0"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
