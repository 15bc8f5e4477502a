"""Limits by traffic control on devices: HTB delays packets, a policer drops them."""
