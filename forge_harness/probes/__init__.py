"""Measuring functions behind the environment and dependencies suites: each returns a value.

They judge nothing. A check holds the limit; a test can put a faulty machine in their place.
"""
