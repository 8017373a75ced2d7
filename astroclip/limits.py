"""Every limit of the readers: one frozen dataclass, each number with its reason.

A file larger than a limit is refused with `LimitError` (HTTP 413) before the work it would cause is done:
sizes are taken from headers, never from what a decoder has already allocated. `DEFAULT_LIMITS` guards
uploads from strangers; `LOCAL_LIMITS` is for files an operator names on the command line, where a whole
DESI petal is a reasonable input. With them the slowest file found so far keeps one core for about two seconds
(tests/io/test_io_bounds.py, benchmarks/chaos/bombs.py).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

__all__ = ["DEFAULT_LIMITS", "LOCAL_LIMITS", "ReaderLimits"]

MIB = 1024 * 1024


@dataclass(frozen=True)
class ReaderLimits:
    """Upper (and a few lower) bounds of what a reader accepts.

    max_file_bytes:             bytes of one file as sent. 32 MiB holds a 1,600 px g,r,z FITS cutout or a
                                DESI coadd of 100 targets.
    max_decompressed_bytes:     bytes a .gz may unpack to; twice the plain limit, since compressed cutouts
                                shrink about 1.5 times.
    max_decompression_ratio:    unpacked / packed, judged once `ratio_free_bytes` are out; float32 sky
                                compresses 1.1-3 times, empty borders more, deflate bombs 1,000 times.
    ratio_free_bytes:           unpacked bytes below which the ratio is not judged (a small blank file is
                                harmless).
    max_gzip_members:           streams in one .gz; gzip writes one, and each costs a copy of what follows it.
    max_hdus:                   FITS extensions; a full SDSS spec file with 50 exposures has about 55 of
                                them, and parsing is linear.
    max_header_cards:           header cards over the whole file; SDSS full files reach 5,000 and DESI
                                coadds 2,000.
    max_continued_cards:        CONTINUE cards of one value, 670 characters; astropy's time grows with their cube.
    max_axes:                   FITS NAXIS; (x, y, band) and one degenerate axis, nothing we read has more.
    max_table_columns:          columns of a FITS table (SDSS SPECOBJ has 126, the standard allows 999).
    max_image_pixels:           height x width of one plane: 4,096 squared is 18 arcmin at 0.262", far above
                                any galaxy cutout.
    max_image_planes:           bands of one image (u, g, r, i, z, y and a few spare).
    max_image_samples:          planes x height x width of the images of a FITS or .npy file, with noise and masks: as
                                many as float32 has in `max_decompressed_bytes`; 8-bit planes have four times that, and
                                each sample takes 14 bytes while it is read. (Of PNG and JPEG: max_picture_pixels.)
    max_picture_pixels:         width x height of a PNG or JPEG: the viewer draws at most 3,000 squared, and a flat
                                picture of 16 megapixels is a file of 100 kB.
    max_picture_parts:          chunks of a PNG or segments of a JPEG; 32 MiB in the usual pieces of 8 kB are 4,096,
                                and each empty one costs Python time.
    max_picture_scans:          scans of a progressive JPEG; encoders write 10, and each decodes the whole picture.
    min_image_side:             pixels; below this there is no galaxy to see (the models look at 96 px).
    max_spectrum_pixels:        samples of one spectrum; DESI has 7,781, the finest echelle grids about
                                300,000.
    max_file_samples:           samples of all spectra of a file: 500 DESI targets; bytes bound this too weakly, since
                                gzip and 8-bit columns hold many a byte.
    min_spectrum_pixels:        samples of one spectrum; fewer carry no line and no break.
    max_targets:                objects in one file (DESI coadds); more belong into the batch command.
    max_text_line:              characters of one CSV line, so that a binary file called .csv ends quickly.
    max_text_lines:             lines of a CSV, blank ones and comments too: the longest spectrum and its comments.
    max_text_comments:          comment lines of a CSV, each searched for units; ECSV headers have tens, a FITS header
                                printed in front of a table some hundred.
    max_npy_header:             bytes of a .npy header, which is parsed as a literal of Python; numpy writes 128.
    """

    max_file_bytes: int = 32 * MIB
    max_decompressed_bytes: int = 64 * MIB
    max_decompression_ratio: float = 20.0
    ratio_free_bytes: int = 4 * MIB
    max_gzip_members: int = 64
    max_hdus: int = 256
    max_header_cards: int = 40_000
    max_continued_cards: int = 10
    max_axes: int = 4
    max_table_columns: int = 999
    max_image_pixels: int = 4096 * 4096
    max_image_planes: int = 12
    max_image_samples: int = 4096 * 4096
    max_picture_pixels: int = 3072 * 3072
    max_picture_parts: int = 8_192
    max_picture_scans: int = 64
    min_image_side: int = 8
    max_spectrum_pixels: int = 400_000
    max_file_samples: int = 4_000_000
    min_spectrum_pixels: int = 32
    max_targets: int = 128
    max_text_line: int = 4_096
    max_text_lines: int = 500_000
    max_text_comments: int = 1_000
    max_npy_header: int = 4_096

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < 2**53:
                raise ValueError(f"{field.name} is {value}; wanted a number above zero")


DEFAULT_LIMITS = ReaderLimits()

LOCAL_LIMITS = replace(
    DEFAULT_LIMITS,
    max_file_bytes=4096 * MIB,
    max_decompressed_bytes=4096 * MIB,
    max_decompression_ratio=200.0,
    max_targets=20_000,
    max_file_samples=400_000_000,
    max_image_samples=1024 * MIB,
)
