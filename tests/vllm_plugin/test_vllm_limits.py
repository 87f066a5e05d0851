"""Adapters of requests that sit a step out are counted: `max_loras` holds over all that run."""

from types import SimpleNamespace

from headway.hosts.vllm.limits import AdapterLimit


def inner(adapter=0, *, eligible=0, under_way=0, computed=10):
    return SimpleNamespace(
        lora_request=SimpleNamespace(lora_int_id=adapter) if adapter else None,
        next_decode_eligible_step=eligible,
        num_output_placeholders=under_way,
        num_computed_tokens=computed,
        num_prompt_tokens=8,
        max_tokens=100,
    )


def scheduler(most, *running):
    config = SimpleNamespace(max_loras=most)
    return SimpleNamespace(lora_config=config, running=list(running), current_step=6)


SITS_OUT = 8  # step 7 is scheduled: `next_decode_eligible_step` beyond it


def test_an_adapter_that_sits_out_keeps_its_place():
    sut = scheduler(2, inner(1), inner(2, eligible=SITS_OUT), inner(2, eligible=SITS_OUT), inner())
    own = sut.lora_config
    limit = AdapterLimit(sut)
    assert sut.lora_config.max_loras == 1, "vLLM counts adapter 1 alone, and may begin none beside it"
    limit.undo()
    assert sut.lora_config is own


def test_the_only_adapter_that_sits_out_leaves_no_place():
    sut = scheduler(1, inner(1, eligible=SITS_OUT), inner())
    AdapterLimit(sut)
    assert sut.lora_config.max_loras == 0


def test_an_adapter_of_which_one_request_runs_is_counted_by_vllm():
    sut = scheduler(2, inner(1), inner(1, eligible=SITS_OUT))
    own = sut.lora_config
    AdapterLimit(sut)
    assert sut.lora_config is own


def test_one_whose_last_token_is_under_way_holds_nothing():
    sut = scheduler(1, inner(1, under_way=1, computed=107))
    own = sut.lora_config
    AdapterLimit(sut)
    assert sut.lora_config is own


def test_one_that_ends_does_not_stand_for_another_that_sits_out():
    sut = scheduler(1, inner(1, under_way=1, computed=107), inner(1, eligible=SITS_OUT))
    AdapterLimit(sut)
    assert sut.lora_config.max_loras == 0


def test_adapters_beyond_the_limit_sit_out_those_admitted_first_run():
    first, second, third = inner(1), inner(2), inner(3, eligible=3)
    sut = scheduler(2, first, second, third, inner(1))
    limit = AdapterLimit(sut)
    assert [each.next_decode_eligible_step for each in (first, second, third)] == [0, 0, SITS_OUT]
    assert sut.lora_config.max_loras == 2, "no request of a fourth begins, and vLLM's own count holds"
    limit.undo()
    assert third.next_decode_eligible_step == 3


def test_requests_without_adapters_change_nothing():
    sut = scheduler(1, inner(), inner(eligible=SITS_OUT))
    own = sut.lora_config
    AdapterLimit(sut)
    assert sut.lora_config is own
