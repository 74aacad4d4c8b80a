"""Preparation of records between reading and rendering: rules, duplicates, contamination, balance, and their ledger."""
