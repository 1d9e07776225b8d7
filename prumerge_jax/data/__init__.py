"""Pixels, texts, data sets, and rows packed from them."""
