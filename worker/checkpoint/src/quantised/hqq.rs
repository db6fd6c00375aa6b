//! Weights of the package hqq, as its layers give them to a model's safetensors.

use super::{HqqForm, QuantisedForm, QuantisedPart, QuantisedWeight, TYPES, Wrong, check_shape, dtype_name};
use crate::{Dtype, Tensor, Tensors};

/// How codes are packed: hqq's name, bits, codes of a cell, and the type of cells.
const PACKINGS: [(&str, usize, usize, Dtype); 5] = [
    ("8bit_u8", 8, 1, Dtype::U8),
    ("4bit_u8", 4, 2, Dtype::U8),
    ("3bit_32", 3, 10, Dtype::I32),
    ("2bit_u8", 2, 4, Dtype::U8),
    ("1bit_u8", 1, 8, Dtype::U8),
];
/// Texts are words such as `torch.bfloat16`.
const TEXT_MAX: usize = 64;

/// The tensor with the codes of a weight of this name.
pub fn codes(name: &str) -> Option<String> {
    Some(format!("{}W_q", name.strip_suffix("weight")?))
}

/// The weight of this name, which has these codes.
pub fn find(tensors: &Tensors, name: &str, codes: &Tensor) -> Result<Option<QuantisedWeight>, Wrong> {
    let said = Said { tensors, stem: name.strip_suffix("weight").unwrap_or(name) };
    let wrong = |what: String| Wrong::Words(format!("{}: {what}", codes.name));
    let [rows, cols] = said.shape()?;
    check_shape(rows, cols).map_err(wrong)?;
    for (key, wanted, what) in [
        ("channel_wise", 1, "one scale for the whole matrix"),
        ("quant_scale", 0, "scales that are quantised"),
        ("quant_zero", 0, "zeros that are quantised"),
    ] {
        if said.number(key)?.is_some_and(|is| is != wanted) {
            return Err(wrong(format!("it has {what} ({key}), which fleet does not read")));
        }
    }
    let packing = said.text("packing")?;
    let Some((_, bits, ..)) = PACKINGS.into_iter().find(|(name, ..)| *name == packing) else {
        return Err(wrong(format!("codes are packed as {packing:?}, which fleet does not read")));
    };
    let dtype = said.get("scale").ok_or_else(|| said.lacks("scale"))?.dtype;
    if !TYPES.iter().any(|(known, _)| *known == dtype) {
        return Err(wrong(format!("its scales are {dtype:?}; fleet reads F32, BF16 and F16")));
    }
    let needed = |key: &str| said.number(key)?.ok_or_else(|| said.lacks(key));
    let (axis, group) = (needed("axis")?, needed("group_size")?);
    let (Ok(axis), Ok(group)) = (usize::try_from(axis), usize::try_from(group)) else {
        return Err(wrong(format!("groups of {group} along axis {axis}")));
    };
    let form = HqqForm { bits, group, axis, dtype };
    if axis > 1 || !form.divides(rows * cols) {
        return Err(wrong(format!("groups of {group} along axis {axis} do not make up {:?}", [rows, cols])));
    }
    Ok(Some(QuantisedWeight { name: name.into(), rows, cols, form: QuantisedForm::Hqq(form) }))
}

impl HqqForm {
    /// Whether groups are whole, and lines of them fill bytes. Words of three bits may have room left.
    pub fn divides(&self, numbers: usize) -> bool {
        let (codes, cell) = self.cell();
        let whole = self.group > 0 && numbers.is_multiple_of(self.group);
        whole && (cell == Dtype::I32 || self.lines(numbers).0.is_multiple_of(codes))
    }

    /// Codes of a cell, and its type.
    fn cell(&self) -> (usize, Dtype) {
        let (_, _, codes, cell) = self.packing();
        (codes, cell)
    }

    fn packing(&self) -> (&'static str, usize, usize, Dtype) {
        PACKINGS.into_iter().find(|(_, bits, ..)| *bits == self.bits).unwrap_or(PACKINGS[0])
    }

    /// The matrix as lines of cells, and the length of a line.
    fn lines(&self, numbers: usize) -> (usize, usize) {
        let groups = numbers / self.group;
        if self.axis == 0 { (self.group, groups) } else { (groups, self.group) }
    }
}

pub fn parts(weight: &QuantisedWeight, form: &HqqForm) -> Vec<QuantisedPart> {
    let numbers = weight.rows * weight.cols;
    let (packing, _, codes, cell) = form.packing();
    let (lines, line) = form.lines(numbers);
    let groups = numbers / form.group;
    let of_groups = if form.axis == 0 { [1, groups] } else { [groups, 1] };
    let part = QuantisedPart::new;
    let flag = |key: &str, is: bool| part(weight.beside(key), Dtype::U8, &[], Some(vec![u8::from(is)]));
    let number = |key: &str, is: usize| {
        part(weight.beside(key), Dtype::I32, &[], Some((is as i32).to_le_bytes().to_vec()))
    };
    let text =
        |key: &str, is: &str| part(weight.beside(key), Dtype::U8, &[is.len()], Some(is.as_bytes().to_vec()));
    let shape = [weight.rows, weight.cols].iter().flat_map(|size| (*size as i64).to_le_bytes()).collect();
    vec![
        part(weight.codes(), cell, &[lines.div_ceil(codes), line], None),
        number("axis", form.axis),
        flag("channel_wise", true),
        text("compute_dtype", &format!("torch.{}", dtype_name(form.dtype))),
        flag("encoded_state_dict", true),
        number("group_size", form.group),
        number("nbits", form.bits),
        flag("offload_meta", false),
        flag("optimize", true),
        text("packing", packing),
        flag("quant_scale", false),
        flag("quant_zero", false),
        flag("round_zero", false),
        part(weight.scales(), form.dtype, &of_groups, None),
        part(weight.beside("shape"), Dtype::I64, &[2], Some(shape)),
        flag("stores_quant_config", true),
        text("unpack_view_dtype", if cell == Dtype::U8 { "torch.uint8" } else { "torch.int32" }),
        flag("view_as_float", false),
        part(weight.zeros(), form.dtype, &of_groups, None),
    ]
}

/// What small tensors say of a layer.
struct Said<'a> {
    tensors: &'a Tensors,
    stem: &'a str,
}

impl<'a> Said<'a> {
    fn lacks(&self, key: &str) -> Wrong {
        Wrong::Words(format!("{}{key} is not there", self.stem))
    }

    fn get(&self, key: &str) -> Option<Tensor<'a>> {
        self.tensors.get(&format!("{}{key}", self.stem))
    }

    fn number(&self, key: &str) -> Result<Option<i64>, Wrong> {
        let Some(tensor) = self.get(key) else { return Ok(None) };
        match self.numbers(&tensor)?[..] {
            [number] => Ok(Some(number)),
            _ => Err(Wrong::Words(format!(
                "{} is {:?} {:?}, not a number",
                tensor.name, tensor.dtype, tensor.shape
            ))),
        }
    }

    fn shape(&self) -> Result<[usize; 2], Wrong> {
        let tensor = self.get("shape").ok_or_else(|| self.lacks("shape"))?;
        let sizes: Vec<usize> =
            self.numbers(&tensor)?.into_iter().filter_map(|size| usize::try_from(size).ok()).collect();
        <[usize; 2]>::try_from(sizes)
            .map_err(|sizes| Wrong::Words(format!("{}: {sizes:?} is not the shape of a matrix", tensor.name)))
    }

    /// A few whole numbers.
    fn numbers(&self, tensor: &Tensor) -> Result<Vec<i64>, Wrong> {
        let bytes = if tensor.len() <= TEXT_MAX { tensor.data()? } else { Vec::new() };
        Ok(match tensor.dtype {
            Dtype::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            Dtype::I32 => bytes.as_chunks().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect(),
            Dtype::U8 | Dtype::BOOL => bytes.into_iter().map(i64::from).collect(),
            _ => Vec::new(),
        })
    }

    fn text(&self, key: &str) -> Result<String, Wrong> {
        let tensor = self.get(key).ok_or_else(|| self.lacks(key))?;
        let bytes = if tensor.len() <= TEXT_MAX { tensor.data()? } else { Vec::new() };
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}
