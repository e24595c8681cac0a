//! Documents that people write: YAML or JSON, and errors that name the place.

use serde::de::DeserializeOwned;
use serde_json::Value;

/// YAML, or JSON with its own line numbers (JSON may be indented with tabs, YAML may not). An error names the field.
pub(crate) fn decode<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut track = serde_path_to_error::Track::new();
    let decoded = if text.trim_start().starts_with('{') {
        let mut json = serde_json::Deserializer::from_str(text);
        T::deserialize(serde_path_to_error::Deserializer::new(&mut json, &mut track))
            .and_then(|value| json.end().map(|()| value))
            .map_err(|error| error.to_string())
    } else {
        let read = |yaml: serde_saphyr::Deserializer<'_, '_>| {
            T::deserialize(serde_path_to_error::Deserializer::new(yaml, &mut track))
        };
        serde_saphyr::with_deserializer_from_str(text, read).map_err(|error| yaml_error(&error))
    };
    decoded.map_err(|message| match track.path().to_string() {
        nowhere if nowhere == "." || nowhere.contains('?') => message,
        field => format!("field {field}: {message}"),
    })
}

/// A YAML error in one line with its place, and without the text around it (which may be secret).
pub(crate) fn yaml_error(error: &serde_saphyr::Error) -> String {
    let rendered = error.without_snippet().render();
    match error.location() {
        Some(at) if !rendered.contains("line ") => format!("line {}, column {}: {rendered}", at.line(), at.column()),
        _ => rendered,
    }
}

/// What [`decode`] has read, as an object of the API. An error names the field.
///
/// It is read by way of text, as the client of the API server reads it: the code that reads a Pod is a megabyte for each
/// kind of deserializer, and stays in memory. So nothing tracks the field either; it is looked for when there is an error.
pub(crate) fn decode_object<T: DeserializeOwned>(mut value: Value) -> Result<T, String> {
    let read = |value: &Value| serde_json::from_str::<T>(&value.to_string());
    read(&value).map_err(|error| {
        let message = error.to_string();
        // Places in a text that nobody wrote.
        let message = message.split(" at line ").next().unwrap_or_default();
        match culprit(&mut value, &|value| read(value).is_ok()).as_str() {
            "" => message.to_owned(),
            field => format!("field {field}: {message}"),
        }
    })
}

/// The innermost field without which `root` can be read; empty if there is no single one.
fn culprit(root: &mut Value, readable: &dyn Fn(&Value) -> bool) -> String {
    let (mut pointer, mut field) = (String::new(), String::new());
    loop {
        let keys: Vec<String> = match root.pointer(&pointer) {
            Some(Value::Object(map)) => map.keys().cloned().collect(),
            Some(Value::Array(list)) => (0..list.len()).map(|index| index.to_string()).collect(),
            _ => return field,
        };
        let found = keys.into_iter().find(|key| {
            let mut without = root.clone();
            match without.pointer_mut(&pointer) {
                Some(Value::Object(map)) => drop(map.remove(key)),
                Some(Value::Array(list)) => drop(key.parse().map(|index: usize| list.remove(index))),
                _ => return false,
            }
            readable(&without)
        });
        let Some(key) = found else { return field };
        match root.pointer(&pointer) {
            Some(Value::Array(_)) => field.push_str(&format!("[{key}]")),
            _ if field.is_empty() => field.push_str(&key),
            _ => field.push_str(&format!(".{key}")),
        }
        pointer.push('/');
        pointer.push_str(&key.replace('~', "~0").replace('/', "~1"));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Shelf {
        #[serde(default)]
        books: Vec<Book>,
        #[serde(default)]
        notes: BTreeMap<String, u8>,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(default)]
    struct Book {
        pages: u16,
    }

    fn error(value: Value) -> String {
        decode_object::<Shelf>(value).unwrap_err()
    }

    #[test]
    fn an_object_is_read_as_it_is() {
        let shelf: Shelf = decode_object(json!({ "books": [{ "pages": 7 }], "notes": { "a": 1 } })).unwrap();
        assert_eq!((shelf.books[0].pages, shelf.notes["a"]), (7, 1));
    }

    #[test]
    fn the_innermost_wrong_field_is_named_with_what_is_wrong() {
        let books = error(json!({ "books": [{ "pages": 7 }, { "pages": "many" }], "notes": { "a": 1 } }));
        assert_eq!(books, "field books[1].pages: invalid type: string \"many\", expected u16");
        let notes = error(json!({ "notes": { "a": 1, "x/~y": -2 } }));
        assert!(notes.starts_with("field notes.x/~y: "), "{notes}");
    }

    #[test]
    fn of_several_wrong_fields_what_they_are_in_is_named() {
        let error = error(json!({ "books": [{ "pages": 7 }, { "pages": "many" }, { "pages": [] }] }));
        assert!(error.starts_with("field books: "), "{error}");
    }
}
