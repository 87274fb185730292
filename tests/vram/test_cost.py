"""Arithmetic is counted as the papers do, and time and money follow from it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lorafit.errors import UsageError
from lorafit.gpus import find_gpu
from lorafit.vram.cost import Range, Work, cost, flops_text, money_text, time_text

FULL = Work(
    active_parameters=7_000_000_000,
    adapter_parameters=0,
    trains_base=True,
    tokens=1_000_000,
    layers=32,
    attention_width=4096,
    context=2048,
)
LORA = replace(FULL, adapter_parameters=40_000_000, trains_base=False)


def test_full_training_is_six_operations_a_weight_and_token() -> None:
    """Kaplan et al.: C = 6ND."""
    assert replace(FULL, layers=0).flops == pytest.approx(6 * 7e9 * 1e6)


def test_attention_is_half_of_palm_s_twelve_l_h_q_t() -> None:
    """Kernels skip what a causal mask masks."""
    weights_only = replace(FULL, layers=0).flops
    assert FULL.flops - weights_only == pytest.approx(6 * 32 * 4096 * 2048 * 1e6)


def test_megatron_s_recomputation_adds_a_forward_pass() -> None:
    assert replace(FULL, checkpointing=True).flops == pytest.approx(FULL.flops * 4 / 3)


def test_the_output_head_is_not_recomputed() -> None:
    again = replace(FULL, checkpointing=True)
    assert again.flops - replace(again, head_parameters=500_000_000).flops == pytest.approx(2 * 500e6 * 1e6)


def test_lora_saves_the_frozen_weights_gradients() -> None:
    assert replace(LORA, layers=0).flops == pytest.approx((4 * 7e9 + 6 * 40e6) * 1e6)
    assert 0.66 < LORA.flops / FULL.flops < 0.70


def test_only_active_experts_and_all_epochs_count() -> None:
    sparse = replace(LORA, active_parameters=3_500_000_000, layers=0, adapter_parameters=0)
    assert sparse.flops == pytest.approx(4 * 3.5e9 * 1e6)
    assert replace(sparse, epochs=2.5).flops == pytest.approx(2.5 * sparse.flops)


def test_time_is_arithmetic_over_peak() -> None:
    done = cost(LORA, find_gpu("A100 80GB"))
    slowest = LORA.flops / (312e12 * 0.25) / 3600
    assert done.hours.high == pytest.approx(slowest)
    assert done.hours.low == pytest.approx(slowest / 2)
    assert done.tokens_per_second.low * done.hours.high * 3600 == pytest.approx(1e6)
    assert done.money is None


def test_more_gpus_are_faster_and_cost_the_same() -> None:
    one = cost(LORA, find_gpu("H100 SXM"), price_per_hour=2.5)
    eight = cost(LORA, find_gpu("H100 SXM"), price_per_hour=2.5, world_size=8)
    assert eight.hours.high == pytest.approx(one.hours.high / 8)
    assert one.money is not None
    assert eight.money is not None
    assert eight.money.high == pytest.approx(one.money.high) == pytest.approx(2.5 * one.hours.high)


def test_four_bits_are_slower_and_a_gpu_without_bf16_uses_its_fp16() -> None:
    gpu = find_gpu("T4")
    assert cost(LORA, gpu, bits=4).hours.high > cost(LORA, gpu).hours.high
    assert cost(LORA, gpu).hours.low == pytest.approx(LORA.flops / (65e12 * 0.5) / 3600)


def test_nothing_to_do_takes_no_time() -> None:
    done = cost(replace(LORA, tokens=0), find_gpu("L4"), price_per_hour=1)
    assert (done.hours, done.money) == (Range(0, 0), Range(0, 0))


@pytest.mark.parametrize("price", [-1.0, math.nan, math.inf])
def test_a_price_has_to_be_one(price: float) -> None:
    with pytest.raises(UsageError, match="price"):
        cost(LORA, find_gpu("L4"), price_per_hour=price)


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (2.1, 4.3, "2.1 to 4.3 h"),
        (0.2, 0.4, "12 to 24 min"),
        (0.004, 0.01, "14 to 36 s"),
        (12.2, 24.4, "12 to 24 h"),
        (48, 96, "2.0 to 4.0 days"),
        (480, 960, "20 to 40 days"),
        (3, 3, "3.0 h"),
        (0, 0, "0.0 s"),
    ],
)
def test_time_in_words(low: float, high: float, text: str) -> None:
    assert time_text(Range(low, high)) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (4.2, 8.6, "4.20 to 8.60"),
        (0.001, 0.004, "under 0.01"),
        (0.001, 0.04, "0.00 to 0.04"),
        (900, 1800.4, "900 to 1,800"),
        (2, 2, "2.00"),
    ],
)
def test_money_in_words(low: float, high: float, text: str) -> None:
    assert money_text(Range(low, high)) == text


@pytest.mark.parametrize(
    ("operations", "text"), [(1.2e18, "1.2 EFLOP"), (4.5e22, "45 ZFLOP"), (3e15, "3.0 PFLOP"), (2e9, "2.0 GFLOP")]
)
def test_operations_in_words(operations: float, text: str) -> None:
    assert flops_text(operations) == text
