"""Limits by nftables: packets over the limit are dropped. Linux 5.13, nft 0.9.9."""
