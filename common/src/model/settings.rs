//! The keys of a `config.json`, read as transformers reads them: a null says what a missing key says.

use serde_json::{Map, Value};

pub type Object = Map<String, Value>;

/// Beyond any size of a model.
const COUNT_MAX: u64 = 1 << 30;
const LAYERS_MAX: u64 = 4096;

/// As transformers 5 writes numbers that JSON does not have: an object of this key and the number's name.
const FLOAT_TAG: &str = "__float__";

/// The object that a file of settings holds. `NaN`, `Infinity` and `-Infinity` stand in some, since Python writes and reads them; they become
/// what transformers 5 writes for them, which is no number, so that a key that is used is refused by its name.
pub fn parse_object(bytes: &[u8]) -> serde_json::Result<Object> {
    serde_json::from_slice(bytes).or_else(|error| match tagged(bytes) {
        Some(tagged) => serde_json::from_slice(&tagged),
        None => Err(error),
    })
}

/// `bytes` with those numbers in the other spelling; `None` where there are none.
fn tagged(bytes: &[u8]) -> Option<Vec<u8>> {
    bytes.trim_ascii_start().starts_with(b"{").then_some(())?;
    let (mut out, mut rest, mut found) = (Vec::with_capacity(bytes.len()), bytes, false);
    while let [first, ..] = rest {
        let number =
            ["NaN", "-Infinity", "Infinity"].into_iter().find(|name| rest.starts_with(name.as_bytes()));
        let taken = match (first, number) {
            (b'"', _) => text_len(rest),
            (_, Some(number)) => {
                found = true;
                out.extend(format!("{{\"{FLOAT_TAG}\":\"{number}\"}}").bytes());
                rest = &rest[number.len()..];
                continue;
            }
            _ => 1,
        };
        out.extend(&rest[..taken]);
        rest = &rest[taken..];
    }
    found.then_some(out)
}

/// Bytes of the text that begins here, with its quotes.
fn text_len(bytes: &[u8]) -> usize {
    let mut at = 1;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

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
    pub fn from_zero_or(&self, key: &str, default: f64) -> Result<f64, String> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let number = value.as_f64().filter(|x| *x >= 0.0 && x.is_finite());
        number.ok_or(format!("{key} is {value}, not a number of at least 0"))
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool, String> {
        // What transformers 4 takes for false, and transformers 5 refuses.
        if default && self.names(key) && self.get(key).is_none() {
            return Err(format!("{key} is null; write true or false"));
        }
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
        let object = value.as_object().filter(|object| !object.contains_key(FLOAT_TAG));
        let object = object.ok_or(format!("{key} is {value}, not an object"))?;
        Ok((!object.is_empty()).then_some(Settings { object }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_that_python_writes_are_read_and_are_none() {
        let text = br#"{"unused": NaN, "list": [Infinity, -Infinity, 1], "text": "is NaN, \"Infinity", "eps": NaN, "rope": NaN}"#;
        let object = parse_object(text).unwrap();
        let tag = |name: &str| json!({"__float__": name});
        assert_eq!(object["list"], json!([tag("Infinity"), tag("-Infinity"), 1]));
        assert_eq!(object["text"], "is NaN, \"Infinity");
        let settings = Settings::new(&object);
        assert!(settings.real("eps").unwrap_err().contains("eps is {\"__float__\":\"NaN\"}"));
        assert!(settings.object("rope").err().unwrap().contains("not an object"));
        for bad in ["{\"a\": nan}", "{\"a\": NaN", "{\"a", "NaN", "{\"a\": \"\\"] {
            assert!(parse_object(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
