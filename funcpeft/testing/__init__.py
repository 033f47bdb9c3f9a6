"""The laws that methods satisfy, for this package's methods and for yours: ``check_method(MyMethod())``."""

from funcpeft.testing.cases import Case
from funcpeft.testing.conformance import check_law, check_method
from funcpeft.testing.laws import LAWS

__all__ = ["LAWS", "Case", "check_law", "check_method"]
