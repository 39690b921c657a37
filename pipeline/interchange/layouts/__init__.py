"""Layouts of published top-k data sets, each read into `base.Document`; see docs/exchange.md."""
