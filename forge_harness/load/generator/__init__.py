"""The process that sends the load.

Nothing outside this directory may import from it: locust and gevent replace sockets, threads and
locks of the whole process.
"""
