//! Adapters that become part of the weights.

use super::{Adapter, Added, Change};
use crate::error::{Error, Result};
use fleet_common::model::Layout;
use fleet_kernels::{self as kernels, Matrix, Scratch, Store};

impl Adapter {
    /// Changes `flat`, the weights of the model that it was opened for, as PEFT's `merge_and_unload` does, in fp32.
    pub fn merge(&self, layout: &Layout, flat: &mut [f32]) -> Result<()> {
        let mut scratch = Scratch::new();
        for Change { parameter, whole, added } in &self.changes {
            let p = &layout.parameters[*parameter];
            let weights = &mut flat[p.range.clone()];
            if let Some(whole) = whole {
                weights.copy_from_slice(whole);
            }
            if let Some(added) = added {
                added.add_to(weights, &p.shape, &mut scratch);
            }
            if !kernels::all_finite(weights) {
                let path = self.path.display();
                return Err(Error::Input(format!(
                    "{path}: with this adapter {} holds values that are NaN or infinite",
                    p.name
                )));
            }
        }
        Ok(())
    }
}

impl Adapter {
    /// Takes out of `flat` what `merge` has added. Of what took the place of the model's own nothing is left.
    pub fn take_out(&self, layout: &Layout, flat: &mut [f32]) -> Result<()> {
        let mut scratch = Scratch::new();
        for Change { parameter, whole, added } in &self.changes {
            let p = &layout.parameters[*parameter];
            let lost = match added {
                Some(Added { magnitude: None, .. }) => None,
                Some(_) => Some("it has magnitudes (DoRA), which leave nothing of the lengths that rows had"),
                None => whole.as_ref().map(|_| "it has taken the place of the model's own"),
            };
            if let Some(lost) = lost {
                return Err(Error::Input(format!(
                    "{}: {} cannot be taken out again: {lost}; take the base model",
                    self.path.display(),
                    p.name
                )));
            }
            if let Some(added) = added {
                let less = Added { scale: -added.scale, ..added.clone() };
                less.add_to(&mut flat[p.range.clone()], &p.shape, &mut scratch);
            }
        }
        Ok(())
    }
}

impl Added {
    fn add_to(&self, weights: &mut [f32], shape: &[usize], scratch: &mut Scratch) {
        let (rows, columns) = (shape[0], shape[1]);
        let scaled: Vec<f32> = self.b.iter().map(|x| x * self.scale).collect();
        let b = Matrix::new(&scaled, rows, self.rank);
        kernels::gemm(b, Matrix::new(&self.a, self.rank, columns), Store::Add, weights, scratch);
        let Some(magnitude) = &self.magnitude else { return };
        for (row, length) in weights.chunks_exact_mut(columns).zip(magnitude) {
            let factor = (f64::from(*length) / kernels::sum_squares(row).sqrt()) as f32;
            row.iter_mut().for_each(|x| *x *= factor);
        }
    }
}
