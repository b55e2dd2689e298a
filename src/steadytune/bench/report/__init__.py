"""The report of a study: what is in it, how it looks, how it is written."""

from .write import write_report as write_report
