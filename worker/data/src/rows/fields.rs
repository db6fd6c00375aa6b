//! The fields of a row, and which of them nobody has asked for.

use super::Row;
use serde_json::Value;
use std::cell::RefCell;

/// A row that notes which of its fields are read.
pub(super) struct Fields<'r> {
    row: &'r Row,
    read: RefCell<Vec<&'r str>>,
}

impl<'r> Fields<'r> {
    pub fn of(row: &'r Row) -> Fields<'r> {
        Fields { row, read: RefCell::default() }
    }

    /// What stands in a field, which is read then.
    pub fn get(&self, name: &str) -> Option<&'r Value> {
        let (name, value) = self.row.get_key_value(name)?;
        self.read.borrow_mut().push(name);
        Some(value)
    }

    /// What stands in a field, which is not read yet.
    pub fn peek(&self, name: &str) -> Option<&'r Value> {
        self.row.get(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &'r str> {
        self.row.keys().map(String::as_str)
    }

    /// Fields with a text, a list or an object in them that were not read.
    pub fn unread(&self) -> Vec<String> {
        let read = self.read.borrow();
        let says = |value: &Value| match value {
            Value::String(text) => !text.trim().is_empty(),
            Value::Array(list) => !list.is_empty(),
            Value::Object(object) => !object.is_empty(),
            _ => false,
        };
        let unread = self.row.iter().filter(|(name, value)| says(value) && !read.contains(&name.as_str()));
        unread.map(|(name, _)| name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_says_something_and_is_not_asked_for_is_unread() {
        let row = json!({"a": "x", "b": "y", "c": " ", "d": [], "e": 3, "f": ["z"], "g": null});
        let fields = Fields::of(row.as_object().unwrap());
        assert_eq!(fields.get("a"), Some(&json!("x")));
        assert_eq!((fields.get("none"), fields.peek("b")), (None, Some(&json!("y"))));
        assert_eq!(fields.unread(), ["b", "f"]);
    }
}
