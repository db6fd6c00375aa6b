//! The environment of a program: what travels with a job, and which of it is a secret.

use super::{Program, Work};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Characters of a variable's name.
const NAME_MAX: usize = 256;
/// Names in a sentence; of more only their number is said.
const NAMED_MAX: usize = 5;

/// One variable of a program's environment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Variable {
    /// Visible ASCII without `=`, at most 256 characters.
    pub name: String,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Value {
    /// Travels because of its name, such as `PATH`.
    Open(String),
    /// Was given for this job. Kept while the job may be started.
    Secret(Secret),
    /// A secret that is not kept any more: the job is not started before it was given again.
    Removed,
}

/// A text that is sent and kept, and not shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: String) -> Secret {
        Secret(text)
    }

    pub fn secret_text(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A variable as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VariableView {
    pub name: String,
    pub kind: VariableKind,
    /// `None` where it was removed, or where the asker may not see it.
    pub value: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VariableKind {
    Open,
    Secret,
    Removed,
}

impl Variable {
    pub fn open(name: impl Into<String>, value: impl Into<String>) -> Variable {
        Variable { name: name.into(), value: Value::Open(value.into()) }
    }

    pub fn secret(name: impl Into<String>, value: impl Into<String>) -> Variable {
        Variable { name: name.into(), value: Value::Secret(Secret::new(value.into())) }
    }

    /// What no program could be started with, in words that follow `a variable`.
    pub fn flaw(&self) -> Option<&'static str> {
        let is_visible = |c: char| c.is_ascii_graphic() && c != '=';
        if self.name.is_empty() || self.name.len() > NAME_MAX || !self.name.chars().all(is_visible) {
            return Some("has a name that is not 1 to 256 visible ASCII characters without `=`");
        }
        self.text().is_some_and(|text| text.contains('\0')).then_some("has a value with a zero byte in it")
    }

    /// What the program finds; `None` where it was removed.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Open(text) => Some(text),
            Value::Secret(secret) => Some(secret.secret_text()),
            Value::Removed => None,
        }
    }

    /// With the value of a secret only for those who may see it.
    pub fn view(&self, secrets: bool) -> VariableView {
        let kind = match self.value {
            Value::Open(_) => VariableKind::Open,
            Value::Secret(_) => VariableKind::Secret,
            Value::Removed => VariableKind::Removed,
        };
        let value = self.text().filter(|_| secrets || kind == VariableKind::Open);
        VariableView { name: self.name.clone(), kind, value: value.map(str::to_owned) }
    }
}

/// `A, B and 3 more`.
pub fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let mut names = names.into_iter();
    let first: Vec<&str> = names.by_ref().take(NAMED_MAX).collect();
    match names.count() {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

impl Work {
    /// Of a program; a training job has none.
    pub fn environment(&self) -> &[Variable] {
        match self {
            Work::Train { .. } => &[],
            Work::Program(Program { env, .. }) => env,
        }
    }

    /// The variables of a program that were given for this job.
    pub fn secrets(&mut self) -> impl Iterator<Item = &mut Variable> {
        let env = match self {
            Work::Train { .. } => &mut [][..],
            Work::Program(Program { env, .. }) => env,
        };
        env.iter_mut().filter(|variable| !matches!(variable.value, Value::Open(_)))
    }

    /// As history and backups have it: secrets are names.
    pub fn without_secrets(mut self) -> Work {
        self.secrets().for_each(|variable| variable.value = Value::Removed);
        self
    }

    /// Names of the variables without which it cannot be started.
    pub fn removed(&self) -> impl Iterator<Item = &str> {
        let removed = self.environment().iter().filter(|variable| variable.value == Value::Removed);
        removed.map(|variable| variable.name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_that_no_program_could_have_are_flaws() {
        for (name, value) in [("", "x"), ("A=B", "x"), ("A B", "x"), ("A\u{1b}[2J", "x"), ("A", "x\0y")] {
            assert!(Variable::secret(name, value).flaw().is_some(), "{name:?}");
        }
        assert_eq!(Variable::secret("A.b-c_1", "any = thing\n").flaw(), None);
        assert!(Variable::open("x".repeat(257), "").flaw().is_some());
    }

    #[test]
    fn a_secret_is_shown_only_to_those_who_may_see_it_and_never_by_debug() {
        let env = vec![Variable::open("PATH", "/bin"), Variable::secret("KEY", "hidden")];
        let work = Work::Program(Program { argv: vec!["true".into()], working_dir: "/".into(), env });
        assert!(!format!("{work:?}").contains("hidden"));
        let shown = |secrets| work.environment().iter().map(|v| v.view(secrets).value).collect::<Vec<_>>();
        assert_eq!(shown(false), [Some("/bin".to_owned()), None]);
        assert_eq!(shown(true), [Some("/bin".to_owned()), Some("hidden".to_owned())]);
        assert_eq!(work.removed().count(), 0);
        assert_eq!(listed(["A"]), "A");
        assert_eq!(listed(["A", "B", "C", "D", "E", "F", "G"]), "A, B, C, D, E and 2 more");
        let without = work.without_secrets();
        assert_eq!(without.removed().collect::<Vec<_>>(), ["KEY"]);
        assert!(!serde_json::to_string(&without).unwrap().contains("hidden"));
    }
}
