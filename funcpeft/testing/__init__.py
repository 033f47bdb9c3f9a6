"""The laws that methods and formats satisfy, for this package's and for yours: ``check_method``, ``check_format``."""

from funcpeft.testing.cases import Case
from funcpeft.testing.conformance import check_format, check_format_law, check_law, check_method
from funcpeft.testing.format_laws import FORMAT_LAWS
from funcpeft.testing.laws import LAWS

__all__ = ["FORMAT_LAWS", "LAWS", "Case", "check_format", "check_format_law", "check_law", "check_method"]
