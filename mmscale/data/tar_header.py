"""Headers of tars that come from anywhere: refused where the standard library would not end."""

import tarfile
from typing import Any

# Names and sizes need some hundred bytes. tarfile's search for fields is quadratic in this.
_EXTENDED_BYTES = 2**14
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class SoundHeader(tarfile.TarInfo):
    """A header for `tarfile.open(..., tarinfo=SoundHeader)`.

    A negative size would lead back to headers that were read before, a long extended header would
    keep the parser busy for hours.

    Raises:
        tarfile.ReadError: Where it is read, if it is one of these.
    """

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        self._require_size()
        if self.type in _EXTENDED and self.size > _EXTENDED_BYTES:
            raise tarfile.ReadError(f"an extended header of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _apply_pax_info(self, *arguments: Any) -> None:
        super()._apply_pax_info(*arguments)  # type: ignore[misc]
        self._require_size()

    def _require_size(self) -> None:
        if self.size < 0:
            raise tarfile.ReadError(f"a size of {self.size} bytes")
