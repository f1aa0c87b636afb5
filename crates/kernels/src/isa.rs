//! Instruction sets: detection, the `RECURFORMER_ISA` override, the list the tests run over, and the dispatch every
//! kernel goes through. The only place where CPU features are checked.

use std::fmt;

use crate::KernelError;
use crate::simd::Portable;

/// Environment variable that overrides the choice of [`Isa::detect`].
pub const ISA_VARIABLE: &str = "RECURFORMER_ISA";

/// Which instruction set an [`Isa`] stands for; for matching and printing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IsaLevel {
    /// Plain Rust, the target's baseline.
    Scalar,
    /// 128-bit NEON (aarch64 baseline).
    Neon,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI: dot products of 8-bit integers.
    Avx512Vnni,
    /// AVX-512 with VNNI and BF16: dot products of bfloat16 pairs.
    Avx512Bf16,
    /// AVX-512 with VNNI, BF16 and AMX bfloat16 tiles.
    Amx,
}

impl IsaLevel {
    const ALL: [IsaLevel; 7] =
        [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512, Self::Avx512Vnni, Self::Avx512Bf16, Self::Amx];

    /// The name used by `RECURFORMER_ISA` and `doctor`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
        }
    }

    fn is_supported(self) -> bool {
        match self {
            Self::Scalar => true,
            Self::Neon => cfg!(target_arch = "aarch64"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => Self::Avx512.is_supported() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Self::Avx512Vnni.is_supported() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Bf16.is_supported() && crate::packed::amx::supported(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Avx512Vnni | Self::Avx512Bf16 | Self::Amx => false,
        }
    }
}

/// An instruction set that this CPU has: a value exists only after detection, so holding one proves support.
/// Ordered slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Isa(IsaLevel);

impl Isa {
    /// Plain Rust, which every CPU runs.
    pub const SCALAR: Isa = Isa(IsaLevel::Scalar);

    /// The name used by `RECURFORMER_ISA` and `doctor`.
    pub fn name(self) -> &'static str {
        self.0.name()
    }
    /// Which instruction set this is.
    pub fn level(self) -> IsaLevel {
        self.0
    }
    /// Every instruction set this CPU can run, slowest first; tests run on each of them.
    pub fn available() -> Vec<Isa> {
        IsaLevel::ALL.into_iter().filter(|level| level.is_supported()).map(Isa).collect()
    }
    /// AMX on a CPU that has everything below it: where the CPU lacks it, products use a software model of the tiles.
    #[cfg(test)]
    pub(crate) fn modelled_amx() -> Option<Isa> {
        IsaLevel::Avx512Bf16.is_supported().then_some(Isa(IsaLevel::Amx))
    }
    /// The instruction set of that name (case-insensitive). An unknown name, or one this CPU lacks, is an error.
    pub fn named(name: &str) -> Result<Isa, KernelError> {
        let wanted = name.trim().to_ascii_lowercase();
        let available = Self::available();
        available.iter().copied().find(|isa| isa.name() == wanted).ok_or_else(|| {
            KernelError::IsaUnavailable {
                requested: name.to_string(),
                available: available.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "),
            }
        })
    }
    /// The best one, or the one `RECURFORMER_ISA` names.
    pub fn detect() -> Result<Isa, KernelError> {
        match std::env::var_os(ISA_VARIABLE) {
            Some(name) if !name.is_empty() => Self::named(&name.to_string_lossy()),
            _ => Ok(Self::available().pop().unwrap_or(Self::SCALAR)),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// CPU features found that some kernel uses or could use, in a fixed order; for `doctor`.
pub fn cpu_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! found {
            ($($name:tt),*) => {
                [$(($name, is_x86_feature_detected!($name))),*]
            };
        }
        let all = found!(
            "sse4.1",
            "avx",
            "avx2",
            "fma",
            "f16c",
            "avx512f",
            "avx512bw",
            "avx512dq",
            "avx512vl",
            "avx512bf16",
            "avx512vnni",
            "avxvnni"
        );
        // Leaf 7, EDX; the standard library does not detect AMX in stable Rust.
        let leaf7 = std::arch::x86_64::__cpuid_count(7, 0).edx;
        let amx = [("amx-bf16", 22), ("amx-tile", 24), ("amx-int8", 25)];
        let amx = amx.into_iter().map(|(name, bit)| (name, leaf7 >> bit & 1 == 1));
        all.into_iter().chain(amx).filter(|&(_, found)| found).map(|(name, _)| name).collect()
    }
    #[cfg(target_arch = "aarch64")]
    {
        vec!["neon"]
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        Vec::new()
    }
}

/// Runs one generic body compiled once per instruction set.
///
/// `dispatch!(isa, inner(args))` calls `inner` in a function that has the instruction set's features enabled, so that
/// the compiler vectorises it with them. `dispatch!(isa, |s| inner(s, args))` also hands over the [`Simd`] token `s`,
/// with fused multiply-add, explicit vectors and [`exp`]. `inner` and everything hot it calls must be
/// `#[inline(always)]`, or it is compiled for the baseline; do not cross threads inside.
///
/// ```text
/// use crate::simd::{Simd, exp};
///
/// pub fn decay(exec: &Exec, x: &mut [f32]) {
///     dispatch!(exec.isa(), |s| decay_with(s, x));
/// }
/// #[inline(always)]
/// fn decay_with<S: Simd>(s: S, x: &mut [f32]) {
///     for x in x {
///         *x = exp(s, -*x);
///     }
/// }
/// ```
///
/// [`Simd`]: crate::simd::Simd
/// [`exp`]: crate::simd::exp
macro_rules! dispatch {
    ($isa:expr, |$s:ident| $body:expr) => {{
        let isa: $crate::isa::Isa = $isa;
        match isa.level() {
            #[cfg(target_arch = "x86_64")]
            level if level >= $crate::isa::IsaLevel::Avx512 => $crate::isa::run_avx512(
                isa,
                #[inline(always)]
                |$s| $body,
            ),
            #[cfg(target_arch = "x86_64")]
            $crate::isa::IsaLevel::Avx2 => $crate::isa::run_avx2(
                isa,
                #[inline(always)]
                |$s| $body,
            ),
            #[cfg(target_arch = "aarch64")]
            $crate::isa::IsaLevel::Neon => $crate::isa::run_fused(
                #[inline(always)]
                |$s| $body,
            ),
            _ => $crate::isa::run_plain(
                #[inline(always)]
                |$s| $body,
            ),
        }
    }};
    ($isa:expr, $body:expr) => {
        $crate::isa::dispatch!($isa, |_s| $body)
    };
}
pub(crate) use dispatch;

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{run_avx2, run_avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Isa, IsaLevel};
    use crate::simd::{Avx2, Avx512};

    /// Runs `f` with AVX-512 enabled. Panics when `isa` is another one.
    #[inline(always)]
    pub(crate) fn run_avx512<R>(isa: Isa, f: impl FnOnce(Avx512) -> R) -> R {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn enabled<R>(f: impl FnOnce(Avx512) -> R) -> R {
            // SAFETY: this function runs only with the token's features, see the call below.
            f(unsafe { Avx512::new() })
        }
        assert!(isa.level() >= IsaLevel::Avx512, "{isa} has no AVX-512");
        // SAFETY: an `Isa` of this or a higher level exists only after `IsaLevel::is_supported` found all these features.
        unsafe { enabled(f) }
    }

    /// Runs `f` with AVX2 and FMA enabled. Panics when `isa` is another one.
    #[inline(always)]
    pub(crate) fn run_avx2<R>(isa: Isa, f: impl FnOnce(Avx2) -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn enabled<R>(f: impl FnOnce(Avx2) -> R) -> R {
            // SAFETY: this function runs only with the token's features, see the call below.
            f(unsafe { Avx2::new() })
        }
        assert_eq!(isa.level(), IsaLevel::Avx2);
        // SAFETY: an `Isa` of this level exists only after `IsaLevel::is_supported` found all these features.
        unsafe { enabled(f) }
    }
}

/// Runs `f` with the baseline's features and no fused multiply-add.
#[inline(always)]
pub(crate) fn run_plain<R>(f: impl FnOnce(Portable<false>) -> R) -> R {
    f(Portable)
}

/// Runs `f` on a target whose baseline has fused multiply-add.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
pub(crate) fn run_fused<R>(f: impl FnOnce(Portable<true>) -> R) -> R {
    f(Portable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_ones_are_refused() {
        for isa in Isa::available() {
            assert_eq!(Isa::named(isa.name()).unwrap(), isa);
            assert_eq!(Isa::named(&isa.name().to_uppercase()).unwrap(), isa);
        }
        assert_eq!(Isa::available()[0], Isa::SCALAR);
        let error = Isa::named("avx1024").unwrap_err().to_string();
        assert!(error.contains("avx1024") && error.contains("scalar"), "{error}");
    }

    #[test]
    fn dispatch_returns_the_body_s_value() {
        for isa in Isa::available() {
            assert_eq!(dispatch!(isa, 1 + 1), 2);
            assert_eq!(dispatch!(isa, |s| crate::simd::Simd::fma(s, 2.0, 3.0, 4.0)), 10.0);
        }
    }
}
