"""Campaigns against a running service: load, overload, faults, kills. Each module is one, and writes its marks as JSON.

`server` starts a real server on a loopback port, `traffic` asks it from a process of its own, `answers` counts.
"""
