"""A limit that many machines share: each takes its max-min fair part, agreed on through Redis."""
