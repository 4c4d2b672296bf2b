"""The serving step: schedule, draft, verify, commit, observe, swap."""
