"""The one exception this package raises for a caller's mistake."""


class ModelError(Exception):
    """A mistake in a folder, a configuration or an argument; `str()` is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
