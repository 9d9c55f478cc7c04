"""The exit codes of the command line. Imports nothing, so that the launcher starts before torch is loaded."""

from __future__ import annotations

FAILED = 1  # a run had to stop, or a fault of ours
BAD_INPUT = 2
LOST_RANK = 3  # of a rank that ended only because another one had
STOPPED_EARLY = 75  # sysexits.h EX_TEMPFAIL: a checkpoint was written, and the same command goes on from it
HUNG = 124  # as timeout(1) has it: the watchdog ended a run that made no progress
INTERRUPTED = 130  # as a shell has it for SIGINT: left at once, nothing saved
