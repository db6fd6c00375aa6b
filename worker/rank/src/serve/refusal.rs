//! Why a request is not served, as OpenAI says it.

use serde_json::{Value, json};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Of HTTP.
    pub status: u16,
    pub message: String,
    /// The key of the request that is meant.
    pub param: Option<String>,
    pub code: Option<&'static str>,
}

impl Refusal {
    pub fn new(status: u16, message: impl Into<String>) -> Refusal {
        Refusal { status, message: message.into(), param: None, code: None }
    }

    /// The request cannot be understood, or asks for what there is not.
    pub fn of(param: &str, message: impl Into<String>) -> Refusal {
        Refusal { param: Some(param.to_owned()), ..Refusal::new(400, message) }
    }

    pub fn coded(self, code: &'static str) -> Refusal {
        Refusal { code: Some(code), ..self }
    }

    pub fn json(&self) -> Value {
        let kind = match self.status {
            404 => "not_found_error",
            503 => "overloaded_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}
