"""Reports of quantized models: one page, its data as JSON, figures, and a summary for notebooks.

`document.py` is the data, `gather.py` takes it from a `Result`; `page.py` and its helpers draw it as HTML with
`style.css`, `page.js` and `page.html`, `figures.py` with matplotlib.
"""

from hq_plugin.report.gather import gather
from hq_plugin.report.page import page, summary
from hq_plugin.report.write import write_report

__all__ = ["gather", "page", "summary", "write_report"]
