"""Streams: nothing lost, nothing added, and no end that was not one."""

from __future__ import annotations
