//! The CUDA kernels' arithmetic on the CPU, against the references of `fleet_kernels`: one thread per block, so that sums over threads are not
//! covered. On a CUDA device they are tried whole before they are used.

#![allow(unsafe_code)]

use fleet_kernels::{Activation, Heads, IGNORED, RopeTable, reference};
use half::bf16;

macro_rules! kernels {
    ($name:ident, $element:ty, $cross_entropy:ident, $swiglu:ident, $backward:ident, $rotary:ident) => {
        mod $name {
            unsafe extern "C" {
                pub fn $cross_entropy(
                    rows: i64,
                    logits: *mut $element,
                    targets: *const i64,
                    weights: *const f32,
                    losses: *mut f32,
                    vocab: i64,
                    scale: f32,
                    flow: i64,
                );
                pub fn $swiglu(x: *const $element, out: *mut $element, rows: i64, f: i64);
                pub fn $backward(
                    x: *const $element,
                    dout: *const $element,
                    dx: *mut $element,
                    rows: i64,
                    f: i64,
                );
                pub fn $rotary(
                    x: *const $element,
                    out: *mut $element,
                    cosines: *const f32,
                    sines: *const f32,
                    tokens: i64,
                    len: i64,
                    heads: i64,
                    dim: i64,
                    half: i64,
                    stride: i64,
                    sign: f32,
                );
            }
        }
    };
}
kernels!(
    of_f32,
    f32,
    fleet_f32_cross_entropy_rows,
    fleet_f32_swiglu,
    fleet_f32_swiglu_backward,
    fleet_f32_rotary
);
kernels!(
    of_bf16,
    half::bf16,
    fleet_bf16_cross_entropy_rows,
    fleet_bf16_swiglu,
    fleet_bf16_swiglu_backward,
    fleet_bf16_rotary
);

fn numbers(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + seed * 104_729) % 1000) as f32 / 250.0 - 2.0).collect()
}

fn close(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    for (at, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{at}: {a} {b}");
    }
}

fn widened(x: &[bf16]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

fn narrowed(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|x| bf16::from_f32(*x)).collect()
}

#[test]
fn cross_entropy_is_the_references() {
    let (rows, vocab) = (5, 37);
    let (targets, weights) = ([0i64, 36, 5, 5, 11], [1f32, 0.0, 2.0, 0.5, 1.0]);
    let logits = numbers(rows * vocab, 1);
    // A weight of zero is a target that is ignored.
    let ignored: Vec<i64> =
        targets.iter().zip(&weights).map(|(t, w)| if *w == 0.0 { IGNORED } else { *t }).collect();
    let mut want = logits.clone();
    let loss = reference::cross_entropy(&mut want, &ignored, Some(&weights), 0.25);

    let (mut flow, mut losses) = (logits.clone(), vec![0f32; rows]);
    // SAFETY: rows, vocabulary and targets fit the slices.
    unsafe {
        of_f32::fleet_f32_cross_entropy_rows(
            rows as i64,
            flow.as_mut_ptr(),
            targets.as_ptr(),
            weights.as_ptr(),
            losses.as_mut_ptr(),
            vocab as i64,
            0.25,
            1,
        );
    }
    close(&flow, &want, 1e-6);
    assert!((f64::from(losses.iter().sum::<f32>()) - loss).abs() < 1e-5, "{losses:?} {loss}");
    assert_eq!(losses[1], 0.0);

    let mut flow = narrowed(&logits);
    // SAFETY: as above.
    unsafe {
        of_bf16::fleet_bf16_cross_entropy_rows(
            rows as i64,
            flow.as_mut_ptr(),
            targets.as_ptr(),
            weights.as_ptr(),
            losses.as_mut_ptr(),
            vocab as i64,
            0.25,
            1,
        );
    }
    close(&widened(&flow), &want, 1e-2);
    let mut same = narrowed(&logits);
    // SAFETY: as above.
    unsafe {
        of_bf16::fleet_bf16_cross_entropy_rows(
            rows as i64,
            same.as_mut_ptr(),
            targets.as_ptr(),
            weights.as_ptr(),
            losses.as_mut_ptr(),
            vocab as i64,
            0.25,
            0,
        );
    }
    assert_eq!(same, narrowed(&logits), "without a gradient nothing is written");
}

#[test]
fn swiglu_is_the_references() {
    let (rows, f) = (3, 7);
    let (x, dout) = (numbers(rows * 2 * f, 2), numbers(rows * f, 3));
    let mut want = vec![0f32; rows * f];
    reference::gated(&x, f, Activation::Silu, &mut want);
    let (mut want_dx, mut inner) = (x.clone(), dout.clone());
    reference::gated_backward(&mut want_dx, f, Activation::Silu, &mut inner);

    let (mut out, mut dx) = (vec![0f32; rows * f], vec![0f32; rows * 2 * f]);
    // SAFETY: rows and widths fit the slices.
    unsafe {
        of_f32::fleet_f32_swiglu(x.as_ptr(), out.as_mut_ptr(), rows as i64, f as i64);
        of_f32::fleet_f32_swiglu_backward(x.as_ptr(), dout.as_ptr(), dx.as_mut_ptr(), rows as i64, f as i64);
    }
    close(&out, &want, 1e-6);
    close(&dx, &want_dx, 1e-6);

    let (x, dout) = (narrowed(&x), narrowed(&dout));
    let (mut out, mut dx) = (narrowed(&out), narrowed(&dx));
    // SAFETY: as above.
    unsafe {
        of_bf16::fleet_bf16_swiglu(x.as_ptr(), out.as_mut_ptr(), rows as i64, f as i64);
        of_bf16::fleet_bf16_swiglu_backward(
            x.as_ptr(),
            dout.as_ptr(),
            dx.as_mut_ptr(),
            rows as i64,
            f as i64,
        );
    }
    close(&widened(&out), &want, 3e-2);
    close(&widened(&dx), &want_dx, 3e-2);
}

#[test]
fn rotary_turns_the_first_numbers_of_each_head_and_back() {
    let (batch, len, heads, dim, half) = (2, 5, 2, 10, 4);
    let (tokens, width) = (batch * len, heads * dim);
    let frequencies: Vec<f64> = (0..half).map(|i| 1.0 / (i + 1) as f64).collect();
    let table = RopeTable::from_frequencies(len, &frequencies, 1.0);
    // Queries and keys of one head each; the values behind them are not turned.
    let shape = Heads { batch, seq: len, q_heads: 1, kv_heads: 1, head_dim: dim };
    let x = numbers(tokens * 3 * dim, 4);
    let mut want = x.clone();
    reference::rope(&mut want, &shape, &table, 0);
    let want: Vec<f32> = want.chunks(3 * dim).flat_map(|token| token[..width].to_vec()).collect();
    let given: Vec<f32> = x.chunks(3 * dim).flat_map(|token| token[..width].to_vec()).collect();

    let angles = |f: fn(f64) -> f64| -> Vec<f32> {
        (0..len).flat_map(|at| frequencies.iter().map(move |w| f(at as f64 * w) as f32)).collect()
    };
    let (cosines, sines) = (angles(f64::cos), angles(f64::sin));
    let turn = |x: &[f32], stride: usize, sign: f32| {
        let mut out = vec![0f32; tokens * width];
        // SAFETY: tokens, widths and tables fit the slices.
        unsafe {
            of_f32::fleet_f32_rotary(
                x.as_ptr(),
                out.as_mut_ptr(),
                cosines.as_ptr(),
                sines.as_ptr(),
                tokens as i64,
                len as i64,
                heads as i64,
                dim as i64,
                half as i64,
                stride as i64,
                sign,
            );
        }
        out
    };
    let out = turn(&x, 3 * dim, 1.0);
    close(&out, &want, 1e-5);
    close(&turn(&out, width, -1.0), &given, 1e-5);

    let (x, mut out) = (narrowed(&x), narrowed(&out));
    // SAFETY: as above.
    unsafe {
        of_bf16::fleet_bf16_rotary(
            x.as_ptr(),
            out.as_mut_ptr(),
            cosines.as_ptr(),
            sines.as_ptr(),
            tokens as i64,
            len as i64,
            heads as i64,
            dim as i64,
            half as i64,
            3 * dim as i64,
            1.0,
        );
    }
    close(&widened(&out), &want, 3e-2);
}

#[test]
fn nvrtc_compiles_them_where_it_can_be_loaded() {
    if !super::cuda::load_nvrtc() {
        eprintln!("SKIPPED: NVRTC cannot be loaded; `make setup CUDA=1` fetches it");
        return;
    }
    for element in ["float", "bf16"] {
        for architecture in ["sm_80", "sm_90"] {
            let image = super::cuda::compiled(fleet_kernels::cuda::FUSED, element, architecture).unwrap();
            let has = |name: &str| image.windows(name.len()).any(|bytes| bytes == name.as_bytes());
            for kernel in ["cross_entropy", "swiglu", "swiglu_backward", "rotary"] {
                assert!(image.starts_with(b"\x7fELF") && has(kernel), "{kernel}");
            }
        }
    }
}
