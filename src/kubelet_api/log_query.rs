//! Pure: the query of a log request.

use http::StatusCode;
use jiff::{SignedDuration, Timestamp};

use crate::runtime::types::{LogOptions, LogSource};

/// What a client wants of a log (`PodLogOptions` of the Kubernetes API, as the API server spells it in a query).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LogQuery {
    /// The attempt before the running or latest one.
    pub(super) previous: bool,
    /// What the runtime is asked.
    pub(super) options: LogOptions,
    /// How lines are written out.
    pub(super) format: LogFormat,
}

/// How lines are written out, and which.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LogFormat {
    /// Each line begins with its time.
    pub(super) timestamps: bool,
    /// Only lines written at or after this moment.
    pub(super) since: Option<Timestamp>,
    /// Not a byte more than this, times included.
    pub(super) limit: Option<u64>,
    /// Only this stream.
    pub(super) only: Option<LogSource>,
}

/// What is wrong with a query. `Display` is the text kubectl prints.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum QueryError {
    /// A value is not of its type.
    #[error("unable to decode query: {name}={value:?} is not {wanted}")]
    Unparsable { name: &'static str, value: String, wanted: &'static str },
    /// The values are not allowed by the rules for `PodLogOptions`.
    #[error("invalid log options: {0}")]
    Invalid(String),
}

impl QueryError {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Unparsable { .. } => StatusCode::BAD_REQUEST,
            Self::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
        }
    }
}

impl LogQuery {
    /// Reads the pairs of a query; names it does not know are ignored, and the first of several wins, as in a kubelet.
    pub(super) fn parse(pairs: &[(String, String)], now: Timestamp) -> Result<Self, QueryError> {
        let query = Query(pairs);
        let tail = match query.first("tail") {
            // The name of `tailLines` in clients from before Kubernetes 1.0, where "all" was its default.
            Some("all") => None,
            Some(_) => query.count("tail", 0)?,
            None => query.count("tailLines", 0)?,
        };
        let only = query.stream()?;
        if only.is_some() && tail.is_some() {
            return Err(QueryError::Invalid("tailLines: may not be used with a single stream".to_owned()));
        }
        let since = query.since(now)?;
        let limit = query.count("limitBytes", 1)?;
        Ok(Self {
            previous: query.flag("previous"),
            options: LogOptions { follow: query.flag("follow"), tail, since },
            format: LogFormat { timestamps: query.flag("timestamps"), since, limit, only },
        })
    }
}

struct Query<'a>(&'a [(String, String)]);

impl<'a> Query<'a> {
    fn first(&self, wanted: &str) -> Option<&'a str> {
        self.0.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str())
    }

    /// A name alone is true, and so is every value that does not say no (apimachinery's rule for query booleans).
    fn flag(&self, name: &str) -> bool {
        self.first(name).is_some_and(|value| !(value == "0" || value.eq_ignore_ascii_case("false")))
    }

    fn integer(&self, name: &'static str) -> Result<Option<i64>, QueryError> {
        let Some(value) = self.first(name) else { return Ok(None) };
        let parsed = value.parse();
        parsed.map(Some).map_err(|_| QueryError::Unparsable { name, value: value.to_owned(), wanted: "an integer" })
    }

    fn count(&self, name: &'static str, least: i64) -> Result<Option<u64>, QueryError> {
        let Some(value) = self.integer(name)? else { return Ok(None) };
        match u64::try_from(value) {
            Ok(count) if value >= least => Ok(Some(count)),
            _ if least == 0 => Err(QueryError::Invalid(format!("{name}: {value} must be greater than or equal to 0"))),
            _ => Err(QueryError::Invalid(format!("{name}: {value} must be greater than 0"))),
        }
    }

    fn since(&self, now: Timestamp) -> Result<Option<Timestamp>, QueryError> {
        let seconds = self.integer("sinceSeconds")?;
        let name = "sinceTime";
        let time = match self.first(name).filter(|value| !value.is_empty() && *value != "null") {
            Some(value) => Some(rfc3339(value).ok_or_else(|| QueryError::Unparsable {
                name,
                value: value.to_owned(),
                wanted: "an RFC 3339 time",
            })?),
            None => None,
        };
        match (seconds, time) {
            (Some(_), Some(_)) => {
                Err(QueryError::Invalid("at most one of sinceTime and sinceSeconds may be given".to_owned()))
            }
            (Some(seconds), None) if seconds < 1 => {
                Err(QueryError::Invalid(format!("sinceSeconds: {seconds} must be greater than 0")))
            }
            // Longer ago than time goes back is everything.
            (Some(seconds), None) => {
                Ok(Some(now.checked_sub(SignedDuration::from_secs(seconds)).unwrap_or(Timestamp::MIN)))
            }
            (None, time) => Ok(time),
        }
    }

    fn stream(&self) -> Result<Option<LogSource>, QueryError> {
        match self.first("stream") {
            None | Some("" | "All") => Ok(None),
            Some("Stdout") => Ok(Some(LogSource::Stdout)),
            Some("Stderr") => Ok(Some(LogSource::Stderr)),
            Some(other) => Err(QueryError::Invalid(format!("stream: {other:?} must be All, Stdout or Stderr"))),
        }
    }
}

/// jiff reads more spellings of a time than RFC 3339 has; a zone or a missing part must not pass.
fn rfc3339(value: &str) -> Option<Timestamp> {
    let separated = matches!(value.as_bytes().get(10), Some(b'T' | b't'));
    let whole = value.is_ascii() && value.as_bytes().get(16) == Some(&b':') && !value.contains('[');
    (separated && whole).then(|| value.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(query: &str) -> Result<LogQuery, QueryError> {
        let pairs: Vec<_> = query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        LogQuery::parse(&pairs, "2026-01-02T03:04:05.5Z".parse().unwrap())
    }

    #[test]
    fn an_empty_query_asks_for_everything() {
        assert_eq!(parse("").unwrap(), LogQuery::default());
        assert_eq!(parse("unknown=1&sinceTime=&stream=All").unwrap(), LogQuery::default());
    }

    #[test]
    fn every_option_is_read() {
        let query =
            parse("follow=true&previous=true&timestamps=true&tailLines=5&limitBytes=7&sinceSeconds=10").unwrap();
        let since = Some("2026-01-02T03:03:55.5Z".parse().unwrap());
        let wanted = LogQuery {
            previous: true,
            options: LogOptions { follow: true, tail: Some(5), since },
            format: LogFormat { timestamps: true, since, limit: Some(7), only: None },
        };
        assert_eq!(query, wanted);
        assert_eq!(parse("stream=Stderr").unwrap().format.only, Some(LogSource::Stderr));
        assert_eq!(parse("tailLines=0").unwrap().options.tail, Some(0));
        assert_eq!(parse("tail=3").unwrap().options.tail, Some(3));
        assert_eq!(parse("tail=all&tailLines=3").unwrap().options.tail, None);
    }

    #[test]
    fn booleans_read_as_the_api_server_reads_them() {
        for (value, wanted) in [("", true), ("true", true), ("1", true), ("yes", true), ("0", false), ("False", false)]
        {
            assert_eq!(parse(&format!("follow={value}")).unwrap().options.follow, wanted, "{value:?}");
        }
    }

    #[test]
    fn since_time_keeps_its_nanoseconds_and_offset() {
        let since = |text: &str| parse(&format!("sinceTime={text}")).unwrap().format.since.unwrap();
        assert_eq!(since("2026-01-02T03:04:05.000000001Z").subsec_nanosecond(), 1);
        assert_eq!(since("2026-01-02T05:04:05+02:00"), since("2026-01-02T03:04:05Z"));
        assert_eq!(parse("sinceSeconds=9223372036854775807").unwrap().format.since, Some(Timestamp::MIN));
    }

    #[test]
    fn what_does_not_parse_is_a_bad_request() {
        for query in [
            "tailLines=x",
            "tailLines=",
            "limitBytes=1.5",
            "sinceSeconds=99999999999999999999",
            "sinceTime=yesterday",
            "sinceTime=2026-01-02",
            "sinceTime=2026-01-02T03:04:05",
            "sinceTime=2026-01-02 03:04:05Z",
            "sinceTime=2026-01-02T03:04:05Z[UTC]",
        ] {
            assert_eq!(parse(query).unwrap_err().status(), StatusCode::BAD_REQUEST, "{query}");
        }
    }

    #[test]
    fn what_is_not_allowed_is_unprocessable_and_names_the_option() {
        for (query, named) in [
            ("tailLines=-1", "tailLines"),
            ("tail=-1", "tail"),
            ("limitBytes=0", "limitBytes"),
            ("limitBytes=-5", "limitBytes"),
            ("sinceSeconds=0", "sinceSeconds"),
            ("sinceSeconds=-3", "sinceSeconds"),
            ("sinceSeconds=3&sinceTime=2026-01-02T03:04:05Z", "sinceTime"),
            ("stream=stdout", "stream"),
            ("stream=Stdout&tailLines=1", "tailLines"),
        ] {
            let error = parse(query).unwrap_err();
            assert_eq!(error.status(), StatusCode::UNPROCESSABLE_ENTITY, "{query}");
            assert!(error.to_string().contains(named), "{query}: {error}");
        }
    }
}
