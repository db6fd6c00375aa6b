//! The keys of a `config.json`, read as transformers reads them: a null says what a missing key says.

use serde_json::{Map, Value};

pub type Object = Map<String, Value>;

/// Beyond any size of a model.
const COUNT_MAX: u64 = 1 << 30;
const LAYERS_MAX: u64 = 4096;

/// Typed access to a configuration. Every error names the key.
pub struct Settings<'a> {
    object: &'a Object,
}

impl<'a> Settings<'a> {
    pub fn new(object: &'a Object) -> Self {
        Self { object }
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// The key stands there, be it with a null.
    pub fn names(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or(format!("{key} is {value}, not a text"))
    }

    /// A positive whole number; `1e4` and `10000.0` are ones.
    pub fn count(&self, key: &str) -> Result<Option<usize>, String> {
        self.count_up_to(key, COUNT_MAX)
    }

    /// How many layers there are.
    pub fn layers(&self, key: &str) -> Result<Option<usize>, String> {
        self.count_up_to(key, LAYERS_MAX)
    }

    fn count_up_to(&self, key: &str, max: u64) -> Result<Option<usize>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let float = || value.as_f64().filter(|x| x.fract() == 0.0).map(|x| x as u64);
        match value.as_u64().or_else(float) {
            Some(n) if n > max => Err(format!("{key} is {value}; fleet takes at most {max}")),
            Some(n) if n > 0 => Ok(Some(n as usize)),
            _ => Err(format!("{key} is {value}, not a positive whole number")),
        }
    }

    pub fn needed(&self, key: &str) -> Result<usize, String> {
        self.count(key)?.ok_or(format!("lacks {key}"))
    }

    pub fn count_or(&self, key: &str, default: usize) -> Result<usize, String> {
        Ok(self.count(key)?.unwrap_or(default))
    }

    /// A whole number of at least 0.
    pub fn whole_or(&self, key: &str, default: usize) -> Result<usize, String> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let number = value.as_u64().filter(|n| *n < u64::from(u32::MAX));
        number.map(|n| n as usize).ok_or(format!("{key} is {value}, not a whole number of at least 0"))
    }

    /// A positive number.
    pub fn real(&self, key: &str) -> Result<Option<f64>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|x| *x > 0.0 && x.is_finite());
        number.map(Some).ok_or(format!("{key} is {value}, not a positive number"))
    }

    pub fn real_or(&self, key: &str, default: f64) -> Result<f64, String> {
        Ok(self.real(key)?.unwrap_or(default))
    }

    /// A number of at least 0.
    pub fn std_or(&self, key: &str, default: f64) -> Result<f64, String> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let number = value.as_f64().filter(|x| *x >= 0.0 && x.is_finite());
        number.ok_or(format!("{key} is {value}, not a number of at least 0"))
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool, String> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or(format!("{key} is {value}, neither true nor false"))
    }

    /// What is not computed has to stand as it does where nobody sets it.
    pub fn only(&self, key: &str, supported: bool) -> Result<(), String> {
        match self.flag(key, supported)? == supported {
            true => Ok(()),
            false => Err(format!("{key} is {}; fleet computes it as {supported} alone", !supported)),
        }
    }

    /// An object that is not empty.
    pub fn object(&self, key: &str) -> Result<Option<Settings<'a>>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let object = value.as_object().ok_or(format!("{key} is {value}, not an object"))?;
        Ok((!object.is_empty()).then_some(Settings { object }))
    }
}
