"""Sealing, keys, the audit log, roles, signatures and scans."""
