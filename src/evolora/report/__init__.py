"""Reports: runs read back, compared in tables, drawn on one page and in one picture."""

from evolora.report.comparison import write_comparison_page
from evolora.report.page import write_report
from evolora.report.picture import write_picture
from evolora.report.records import RunRecord
from evolora.report.tables import compare, summary_table, to_markdown

__all__ = [
    "RunRecord",
    "compare",
    "summary_table",
    "to_markdown",
    "write_comparison_page",
    "write_picture",
    "write_report",
]
