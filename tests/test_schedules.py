"""Step numbers of respaced samplers, as published."""

import pytest

from ddo_cli.diffusion.schedules import respaced_steps


def test_even_strides_are_rounded():
    steps = respaced_steps(1000, "250")
    assert steps[:6] == [0, 4, 8, 12, 16, 20]
    assert steps[-5:] == [983, 987, 991, 995, 999]
    assert respaced_steps(1000, "50")[:7] == [0, 20, 41, 61, 82, 102, 122]
    assert respaced_steps(1000, "100")[-1] == 999
    assert len(respaced_steps(1000, "100")) == 100


def test_sections():
    assert respaced_steps(300, "10,15,20") == sorted(set(respaced_steps(300, "10,15,20")))
    steps = respaced_steps(300, "10,15,20")
    assert [sum(low <= step < low + 100 for step in steps) for low in (0, 100, 200)] == [10, 15, 20]
    assert respaced_steps(10, "1,1,1") == [0, 4, 7]  # the first section is the longer one


def test_ddim_strides():
    assert respaced_steps(1000, "ddim25") == list(range(0, 961, 40))


@pytest.mark.parametrize(("text", "match"), [("1001", "cannot give"), ("ddim300", "whole stride"), ("0", "cannot")])
def test_refused(text, match):
    with pytest.raises(ValueError, match=match):
        respaced_steps(1000, text)
