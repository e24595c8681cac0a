//! The process that holds a sandbox's namespaces: it sleeps until it is told to end.
//!
//! It runs as PID 1, which shapes all of it: the kernel drops signals that PID 1 neither blocks nor handles, so the two
//! that end it are blocked and waited for; and where the containers share its PID namespace their orphans become its
//! children, so SIGCHLD is ignored and the kernel reaps them.
//!
//! It is built by `build.rs` without the standard library and linked statically, so that its image is this one file.
#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};

const SIGINT: usize = 2;
const SIGTERM: usize = 15;
const SIGCHLD: usize = 17;
const SIG_BLOCK: usize = 0;
const SIG_IGN: usize = 1;
/// Size of the kernel's signal set in bytes.
const SET_SIZE: usize = 8;

#[cfg(target_arch = "x86_64")]
mod nr {
    pub const RT_SIGACTION: usize = 13;
    pub const RT_SIGPROCMASK: usize = 14;
    pub const RT_SIGTIMEDWAIT: usize = 128;
    pub const EXIT_GROUP: usize = 231;
}

#[cfg(target_arch = "aarch64")]
mod nr {
    pub const RT_SIGACTION: usize = 134;
    pub const RT_SIGPROCMASK: usize = 135;
    pub const RT_SIGTIMEDWAIT: usize = 137;
    pub const EXIT_GROUP: usize = 94;
}

/// One system call of four arguments.
///
/// # Safety
/// The arguments must be what the call of that number expects; pointers must be valid for its duration.
#[cfg(target_arch = "x86_64")]
unsafe fn syscall(number: usize, a: usize, b: usize, c: usize, d: usize) -> isize {
    let result: isize;
    // SAFETY: the kernel's calling convention; rcx and r11 are what `syscall` itself overwrites.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// One system call of four arguments.
///
/// # Safety
/// The arguments must be what the call of that number expects; pointers must be valid for its duration.
#[cfg(target_arch = "aarch64")]
unsafe fn syscall(number: usize, a: usize, b: usize, c: usize, d: usize) -> isize {
    let result: isize;
    // SAFETY: the kernel's calling convention; it preserves every register but x0.
    unsafe {
        asm!("svc 0", in("x8") number, inlateout("x0") a as isize => result, in("x1") b, in("x2") c, in("x3") d,
            options(nostack));
    }
    result
}

/// Where the kernel starts the process: not by a call, so the stack has to be aligned as a callee expects it.
#[cfg(target_arch = "x86_64")]
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub extern "C" fn _start() -> ! {
    naked_asm!("and rsp, -16", "call {main}", "ud2", main = sym main)
}

/// Where the kernel starts the process; the stack is aligned already.
#[cfg(target_arch = "aarch64")]
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub extern "C" fn _start() -> ! {
    naked_asm!("b {main}", main = sym main)
}

extern "C" fn main() -> ! {
    // handler, flags, (restorer,) mask: only the handler differs from zero, and the longest layout is four words.
    let ignore: [usize; 4] = [SIG_IGN, 0, 0, 0];
    let ends: u64 = 1 << (SIGINT - 1) | 1 << (SIGTERM - 1);
    let set = &raw const ends as usize;
    // SAFETY: both pointers are to locals that outlive the calls.
    unsafe {
        syscall(nr::RT_SIGACTION, SIGCHLD, ignore.as_ptr() as usize, 0, SET_SIZE);
        syscall(nr::RT_SIGPROCMASK, SIG_BLOCK, set, 0, SET_SIZE);
    }
    loop {
        // SAFETY: as above; no information and no timeout are asked for.
        let signal = unsafe { syscall(nr::RT_SIGTIMEDWAIT, set, 0, 0, SET_SIZE) };
        // Anything below zero is an interruption (a debugger, a freezer): wait again.
        if signal > 0 {
            // SAFETY: ends the process; nothing to free.
            unsafe { syscall(nr::EXIT_GROUP, 0, 0, 0, 0) };
        }
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        // SAFETY: ends the process with a code that says it was not asked to.
        unsafe { syscall(nr::EXIT_GROUP, 101, 0, 0, 0) };
    }
}
