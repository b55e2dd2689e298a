"""The report of a study: its tables, figures and verdict, and the files it is written to."""

from .write import write_report as write_report
