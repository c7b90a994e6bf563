"""Drills: faults put in on purpose, and what they found.

`storage` holds the crash campaigns of a state store. This package imports nothing by itself: its
child programs start in a few milliseconds, thousands of times.
"""
