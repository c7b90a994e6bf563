"""Open-loop load on a server, and what can be said about it afterwards.

Requests are sent when a seeded schedule says so, whether or not earlier ones were answered, so a
stall cannot hide the requests that would have met it. Locust sends them in a process of its own
(`generator/`, never imported here: importing locust patches the whole process); everything else
reads what it wrote. See docs/load.md.
"""
