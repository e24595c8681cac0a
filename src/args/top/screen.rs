//! The terminal: its other page for the table, keys one by one; all as it was before once it is dropped.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::Context;
use rustix::termios::{self, LocalModes, OptionalActions, SpecialCodeIndex, Termios};
use tokio::io::AsyncReadExt as _;

/// The other page, without a cursor (xterm's control sequences, which every terminal in use knows).
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const REST_OF_LINE: &str = "\x1b[K";
const REST_OF_PAGE: &str = "\x1b[J";
/// Switches a special character of the terminal off (termios(3), `_POSIX_VDISABLE`).
const NO_CHARACTER: u8 = 0;
/// Ctrl-D.
const END_OF_TRANSMISSION: u8 = 4;

/// What was pressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// It should end.
    Quit,
    /// Nothing that means anything here.
    Other,
}

/// Where a size is `(columns, rows)`.
pub(super) type Size = (usize, usize);

/// A terminal that shows the table.
pub(super) struct Screen {
    out: File,
    keys: Option<Keys>,
}

/// Standard input, if it is a terminal.
struct Keys {
    /// Read on a thread of the runtime's: whoever ends the program does not wait for it.
    input: tokio::fs::File,
    terminal: OwnedFd,
    before: Termios,
}

impl Screen {
    /// Takes over standard output, and standard input if that is a terminal too.
    pub(super) fn open() -> anyhow::Result<Self> {
        let out = io::stdout().as_fd().try_clone_to_owned().context("failed to use the terminal")?;
        let input = io::stdin().as_fd().try_clone_to_owned().context("failed to use the terminal")?;
        Self::on(out, input)
    }

    fn on(out: OwnedFd, input: OwnedFd) -> anyhow::Result<Self> {
        let keys = if termios::isatty(&input) { Some(Keys::new(input)?) } else { None };
        // From here on dropping it puts things right.
        let mut screen = Self { out: out.into(), keys };
        screen.out.write_all(ENTER.as_bytes()).context("failed to write to the terminal")?;
        Ok(screen)
    }

    /// What fits; anything, where the terminal does not say.
    pub(super) fn size(&self) -> Size {
        let said = termios::tcgetwinsize(&self.out).ok().filter(|size| size.ws_col > 0 && size.ws_row > 0);
        said.map_or((usize::MAX, usize::MAX), |size| (size.ws_col.into(), size.ws_row.into()))
    }

    /// Shows a text in place of the one before.
    pub(super) fn draw(&mut self, text: &str) -> anyhow::Result<()> {
        let lines = text.trim_end_matches('\n').replace('\n', &format!("{REST_OF_LINE}\r\n"));
        // In one piece, so that it does not flicker.
        let page = format!("{HOME}{lines}{REST_OF_LINE}{REST_OF_PAGE}");
        self.out.write_all(page.as_bytes()).context("failed to write to the terminal")
    }

    /// The next key; never, where there are none. Cancel-safe.
    pub(super) async fn key(&mut self) -> Key {
        let Some(keys) = &mut self.keys else { return std::future::pending().await };
        let mut pressed = [0; 64];
        match keys.input.read(&mut pressed).await {
            // Nobody sits there any more.
            Ok(0) | Err(_) => Key::Quit,
            Ok(_) if matches!(pressed[0], b'q' | b'Q' | END_OF_TRANSMISSION) => Key::Quit,
            Ok(_) => Key::Other,
        }
    }
}

impl Keys {
    fn new(input: OwnedFd) -> anyhow::Result<Self> {
        let before = termios::tcgetattr(&input).context("failed to read the terminal's mode")?;
        let mut mode = before.clone();
        // Each key at once and unseen; Ctrl-C stays a signal. Stopping it would leave the other page open.
        mode.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
        mode.special_codes[SpecialCodeIndex::VSUSP] = NO_CHARACTER;
        termios::tcsetattr(&input, OptionalActions::Now, &mode).context("failed to set the terminal's mode")?;
        let terminal = input.try_clone().context("failed to use the terminal")?;
        Ok(Self { input: File::from(input).into(), terminal, before })
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        // Nobody is left to be told of a failure.
        let _ = termios::tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.out.write_all(LEAVE.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};

    use super::*;

    #[tokio::test]
    async fn keys_are_read_one_by_one_and_the_terminal_is_put_back() {
        let there = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&there).unwrap();
        unlockpt(&there).unwrap();
        let here = ioctl_tiocgptpeer(&there, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        let mut person = File::from(there);
        let modes = || {
            let now = termios::tcgetattr(&here).unwrap();
            (now.local_modes, now.special_codes[SpecialCodeIndex::VSUSP])
        };
        let before = modes();
        let mut screen = Screen::on(here.try_clone().unwrap(), here.try_clone().unwrap()).unwrap();
        assert!(!modes().0.intersects(LocalModes::ICANON | LocalModes::ECHO));
        assert!(modes().0.contains(LocalModes::ISIG), "Ctrl-C is a signal");
        screen.draw("one\ntwo\n").unwrap();
        person.write_all(b"x").unwrap();
        assert_eq!(screen.key().await, Key::Other, "without a newline");
        person.write_all(b"q").unwrap();
        assert_eq!(screen.key().await, Key::Quit);
        drop(screen);
        assert_eq!(modes(), before);
        let mut shown = Vec::new();
        let mut bytes = [0; 256];
        while !String::from_utf8_lossy(&shown).contains(LEAVE) {
            let read = person.read(&mut bytes).unwrap();
            shown.extend_from_slice(&bytes[..read]);
        }
        let shown = String::from_utf8(shown).unwrap();
        assert_eq!(shown, format!("{ENTER}\x1b[Hone\x1b[K\r\r\ntwo\x1b[K\x1b[J{LEAVE}"));
    }
}
