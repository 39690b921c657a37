"""`distily-cache report`: one page about a store."""

from pipeline.report.facts import StoreFacts, gather
from pipeline.report.page import default_file, store_page

__all__ = ["StoreFacts", "default_file", "gather", "store_page"]
