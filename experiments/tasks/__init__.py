"""Toys that studies share: sizes in a frozen dataclass, the rest pure functions of it."""
