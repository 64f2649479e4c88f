//! Inflates a compressed refusal while it streams, so that it can be searched for the access token.

use std::io::{Error, Result, Write};

use brotli_decompressor::DecompressorWriter;
use bytes::{Buf, Bytes};
use flate2::write::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};

/// How much is inflated at once, in bytes: deflate makes at most a thousand times as much of it.
const STEP: usize = 1 << 10;
/// Most text from one step, in bytes. Brotli may make more of it, but not for a refusal that anybody reads.
const MAX_PIECE: usize = 4 << 20;
/// Size of the decoder's output buffer for brotli, in bytes.
const BROTLI_BUFFER: usize = 4096;

/// A stream that is inflated piece by piece.
pub(super) struct Inflater {
    decoder: Decoder,
    /// What was not inflated yet.
    input: Bytes,
}

enum Decoder {
    Gzip(MultiGzDecoder<Piece>),
    Zlib(ZlibDecoder<Piece>),
    Deflate(DeflateDecoder<Piece>),
    Brotli(Box<DecompressorWriter<Piece>>),
}

/// The text of one step.
#[derive(Default)]
struct Piece(Vec<u8>);

impl Write for Piece {
    fn write(&mut self, text: &[u8]) -> Result<usize> {
        if self.0.len() + text.len() > MAX_PIECE {
            return Err(Error::other("it inflates to far more than a refusal"));
        }
        self.0.extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

impl std::fmt::Debug for Inflater {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Inflater({} bytes of input)", self.input.len())
    }
}

impl Inflater {
    /// For a body in `coding` that begins with `start`; `None` if the coding is not known.
    pub(super) fn new(coding: &[u8], start: &[u8]) -> Option<Self> {
        let piece = Piece::default();
        let decoder = match coding.to_ascii_lowercase().as_slice() {
            b"gzip" | b"x-gzip" => Decoder::Gzip(MultiGzDecoder::new(piece)),
            b"deflate" if is_zlib(start) => Decoder::Zlib(ZlibDecoder::new(piece)),
            // What some servers send by that name.
            b"deflate" => Decoder::Deflate(DeflateDecoder::new(piece)),
            b"br" => Decoder::Brotli(Box::new(DecompressorWriter::new(piece, BROTLI_BUFFER))),
            _ => return None,
        };
        Some(Self { decoder, input: Bytes::new() })
    }

    /// Takes the next part of the stream, once there is no piece left of the one before.
    pub(super) fn push(&mut self, data: Bytes) {
        self.input = data;
    }

    /// The next text that is not empty; `None` if more of the stream is needed for it.
    ///
    /// # Errors
    /// Fails if the stream cannot be inflated.
    pub(super) fn piece(&mut self) -> Result<Option<Vec<u8>>> {
        while self.input.has_remaining() {
            let step = self.input.split_to(STEP.min(self.input.len()));
            self.decoder.writer().write_all(&step)?;
            let text = self.decoder.take_text();
            if !text.is_empty() {
                return Ok(Some(text));
            }
        }
        Ok(None)
    }

    /// What is left at the end of the stream.
    ///
    /// # Errors
    /// Fails if the stream is not complete.
    pub(super) fn end(mut self) -> Result<Vec<u8>> {
        match &mut self.decoder {
            Decoder::Gzip(decoder) => decoder.try_finish()?,
            Decoder::Zlib(decoder) => decoder.try_finish()?,
            Decoder::Deflate(decoder) => decoder.try_finish()?,
            Decoder::Brotli(decoder) => decoder.flush()?,
        }
        Ok(self.decoder.take_text())
    }
}

/// Whether the bytes begin with a header of zlib (RFC 1950, section 2.2).
fn is_zlib(start: &[u8]) -> bool {
    matches!(start, [method, check, ..] if method & 0xf == 8 && (u16::from(*method) << 8 | u16::from(*check)) % 31 == 0)
}

impl Decoder {
    fn writer(&mut self) -> &mut dyn Write {
        match self {
            Self::Gzip(decoder) => decoder,
            Self::Zlib(decoder) => decoder,
            Self::Deflate(decoder) => decoder,
            Self::Brotli(decoder) => decoder,
        }
    }

    fn take_text(&mut self) -> Vec<u8> {
        let piece = match self {
            Self::Gzip(decoder) => decoder.get_mut(),
            Self::Zlib(decoder) => decoder.get_mut(),
            Self::Deflate(decoder) => decoder.get_mut(),
            Self::Brotli(decoder) => decoder.get_mut(),
        };
        std::mem::take(&mut piece.0)
    }
}
