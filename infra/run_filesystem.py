"""The filesystem that Ray keeps a run's checkpoints on: objects only, no folders.

Arrow's S3 client writes an empty object ``folder/`` for every folder it is told to make. S3 needs
none, and the embedded S3 server refuses them. Here making a folder does nothing, and removing one
removes the objects in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyarrow.fs import (
    FileInfo,
    FileSelector,
    FileSystem,
    FileSystemHandler,
    FileType,
    LocalFileSystem,
    PyFileSystem,
)

from infra import storage


def run_filesystem(uri: str) -> tuple[FileSystem, str]:
    """The filesystem of ``uri`` and the path on it, to be pickled into controller and workers."""
    filesystem, path = storage.arrow_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        return filesystem, path
    return PyFileSystem(WithoutFolders(filesystem)), path


class WithoutFolders(FileSystemHandler):  # type: ignore[misc]  # pyarrow is untyped
    """Everything goes to ``filesystem`` as it is, except what concerns folders."""

    def __init__(self, filesystem: FileSystem) -> None:
        self._filesystem = filesystem

    def __reduce__(self) -> tuple[Any, ...]:
        return WithoutFolders, (self._filesystem,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithoutFolders) and self._filesystem == other._filesystem

    def __hash__(self) -> int:
        return hash(WithoutFolders)

    def get_type_name(self) -> str:
        """The name of the filesystem below."""
        return str(self._filesystem.type_name)

    def normalize_path(self, path: str) -> str:
        """As below."""
        return str(self._filesystem.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        """A folder is there when an object lies in it."""
        return list(self._filesystem.get_file_info(paths))

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        """As below."""
        return list(self._filesystem.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: a folder appears with its first object."""

    def delete_dir(self, path: str) -> None:
        """Remove every object in the folder."""
        selector = FileSelector(path, recursive=True, allow_not_found=True)
        for info in self._filesystem.get_file_info(selector):
            if info.type == FileType.File:
                self._filesystem.delete_file(info.path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """As ``delete_dir``."""
        self.delete_dir(path)

    def delete_root_dir_contents(self) -> None:
        """Never."""
        raise NotImplementedError("a run does not empty its storage")

    def delete_file(self, path: str) -> None:
        """As below."""
        self._filesystem.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        """As below."""
        self._filesystem.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        """As below."""
        self._filesystem.copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        """As below."""
        return self._filesystem.open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        """As below."""
        return self._filesystem.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Mapping[str, str]) -> Any:
        """As below."""
        return self._filesystem.open_output_stream(path, metadata=metadata or None)

    def open_append_stream(self, path: str, metadata: Mapping[str, str]) -> Any:
        """As below."""
        return self._filesystem.open_append_stream(path, metadata=metadata or None)
