"""The switches: what they can be set to, and what is said of a name that there is not."""

import pytest

from libragrad_minimal import LIBRA, Rules


def test_rules_are_switches():
    with pytest.raises(ValueError, match="the rule attention is True, False or \"halve\", got 'nonsense'"):
        Rules(attention="nonsense")
    with pytest.raises(ValueError, match="the rule norm is True or False, got 'halve'"):
        Rules(norm="halve")


def test_rules_say_which_names_there_are():
    with pytest.raises(ValueError, match="no rule is called.*nrom.*norm"):
        LIBRA.without("nrom")
    assert Rules().without("norm", "product") == Rules(norm=False, product=False)
