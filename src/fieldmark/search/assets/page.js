// The page of a search service: asks the same operations as any client, see openapi.json.
const PAGE = 12, MOST = 200, SHOWN = 3;
const NEARLY_EVEN = 1.5; // of a photo's parts the largest weight, in even shares
const $ = (id) => document.getElementById(id);
const part = (kind, of = {}, ...children) => {
  const made = Object.assign(document.createElement(kind), of);
  made.append(...children);
  return made;
};
const isolated = (text) => part("bdi", {textContent: text}); // names may be written from right to left

let about = null;
let query = {}; // {file, text, hybrid} or {item}
let filters = {}; // column -> value
let wanted = PAGE, answer = null, running = null;
const asked = []; // queries of this visit, for the browser's back button: a photo has no address

// -- asking

class Refused extends Error {}

const token = () => sessionStorage.getItem("fieldmark-token");

async function ask(path, options = {}) {
  const headers = token() ? {Authorization: `Bearer ${token()}`} : {};
  let got;
  try {
    got = await fetch(path, {...options, headers});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The service was not reached; check the connection and try again.");
  }
  if (got.ok) return got;
  const said = await got.json().then((body) => body.error.message, () => `The service answered ${got.status}.`);
  if (got.status !== 401) throw new Refused(said);
  await signIn(token() ? said : "");
  return ask(path, options);
}

const askJson = async (path, options) => (await ask(path, options)).json();

function signIn(said) {
  if (said) $("token-note").textContent = said;
  if (!$("sign-in").open) $("sign-in").showModal();
  return new Promise((done) => $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("fieldmark-token", $("token").value);
    $("sign-in").close();
    done();
  }, {once: true}));
}

// An <img> cannot send a token, so with one the photo is asked for and handed over. One that is not there shows its alt.
async function show(image, path) {
  if (!token()) {
    image.src = path;
    return;
  }
  const photo = await ask(path).then((got) => got.blob(), () => new Blob());
  image.addEventListener("load", () => URL.revokeObjectURL(image.src), {once: true});
  image.src = URL.createObjectURL(photo);
}

const where = () => Object.entries(filters)
  .map(([column, value]) => `\`${column}\` = '${value.replaceAll("'", "''")}'`).join(" AND ");

function request(signal) {
  if (query.item) {
    const given = new URLSearchParams({k: wanted});
    if (where()) given.set("where", where());
    return askJson(`similar/${encodeURIComponent(query.item.item_id)}?${given}`, {signal});
  }
  const form = new FormData();
  if (query.file) form.set("image", query.file);
  if (query.text) form.set("text", query.text);
  if (query.text && query.hybrid) form.set("hybrid", "true");
  if (query.file && about.attention) form.set("attention", "true");
  if (where()) form.set("where", where());
  form.set("k", wanted);
  return askJson("search", {method: "POST", body: form, signal});
}

async function search({focus = false} = {}) {
  running?.abort();
  const mine = running = new AbortController();
  fail("");
  $("found").setAttribute("aria-busy", "true");
  $("status").textContent = "Searching";
  try {
    const got = await request(mine.signal);
    if (mine !== running) return;
    answer = got;
    $("start").hidden = true;
    showResults();
    if (focus) $("found-title").focus({preventScroll: true});
  } catch (error) {
    if (error.name === "AbortError" || mine !== running) return;
    answer = null;
    $("found").hidden = true;
    fail(error);
  } finally {
    if (mine === running) $("found").removeAttribute("aria-busy");
  }
}

function fail(error) {
  if (error && !(error instanceof Refused)) console.error(error);
  $("alert").textContent = error instanceof Refused ? error.message : error ? "The page failed; load it again." : "";
  $("alert").hidden = !error;
  if (error) $("status").textContent = "";
}

// -- the query

const isAsked = () => Boolean(query.item || query.file || query.text);

// A new query, with a step in the browser's history.
function start(next, {push = true} = {}) {
  query = next;
  wanted = PAGE;
  $("compare").close();
  if (push) remember();
  showQuery();
  if (isAsked()) return search({focus: true}).then(() => scrollTo({top: 0}));
  running?.abort();
  answer = null;
  $("found").hidden = true;
  fail("");
  return showExamples();
}

// Some items to begin with, of those that pass the filters.
async function showExamples() {
  try {
    const {items} = await askJson(`examples?${new URLSearchParams(where() ? {where: where()} : {})}`);
    if (isAsked()) return;
    $("examples").replaceChildren(...items.map((item) => part("li", {}, photoButton(item))));
    $("start-title").textContent = items.length ? "Or begin with one of these" : about.items ? "No item passes the filters" : "The store has no items yet";
    $("start").hidden = false;
  } catch (error) {
    fail(error);
  }
}

function photoButton(item) {
  const image = part("img", {alt: nameOf(item), loading: "lazy"});
  show(image, `${item.photo}?side=384`);
  const made = part("button", {type: "button", className: "shot", title: "Search with this item"}, image);
  made.ariaLabel = `Search with ${nameOf(item)}`;
  made.addEventListener("click", () => start({item}));
  return made;
}

function remember() {
  asked.push({query, filters: {...filters}});
  const address = query.item ? `?item=${encodeURIComponent(query.item.item_id)}` : location.pathname;
  history.pushState({number: asked.length - 1}, "", address);
}

function showQuery() {
  const photo = query.item || query.file;
  $("chosen").hidden = !photo;
  $("drop").classList.toggle("full", Boolean(photo));
  $("choose").firstElementChild.textContent = photo ? "Choose another photo" : "Choose a photo";
  $("text").value = query.text ?? "";
  $("preview").hidden = false;
  if (query.item) show($("preview"), `${query.item.photo}?side=256`);
  if (query.file) $("preview").src = addressOf(query.file);
  $("asked-kind").textContent = query.item ? "Item" : "Your photo";
  $("asked-name").textContent = query.item ? nameOf(query.item) : query.file?.name ?? "";
  $("preview").alt = query.item ? nameOf(query.item) : "Your photo";
}

const addresses = new WeakMap();
function addressOf(file) {
  if (!addresses.has(file)) addresses.set(file, URL.createObjectURL(file));
  return addresses.get(file);
}

async function takePhoto(file) {
  if (!file || !await ready) return;
  if (file.size > about.max_body_mb * 1e6) {
    fail(new Refused(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB; expected at most ${about.max_body_mb} MB.`));
    return;
  }
  start({...words(), file});
}

function words() {
  const text = $("text").value.trim();
  return text ? {text, hybrid: $("hybrid").checked || !about.texts} : {};
}

const nameOf = (item) => item.title || item.label || item.item_id;

// -- filters

function showFilters() {
  $("filters").hidden = !about.facets.length;
  $("facets").replaceChildren(...about.facets.map((facet) => {
    const choice = part("select", {name: facet.column}, new Option("any", ""),
      ...facet.values.map(({value, count}) => new Option(`${value} (${count})`, value)));
    choice.addEventListener("change", () => {
      if (choice.value) filters[facet.column] = choice.value;
      else delete filters[facet.column];
      filtered();
    });
    const more = facet.n_values > facet.values.length ? ` (${facet.values.length} of ${facet.n_values})` : "";
    return part("label", {}, part("span", {textContent: facet.name.replaceAll("_", " ") + more}), choice);
  }));
}

function filtered() {
  markFilters();
  wanted = PAGE;
  if (isAsked()) search();
  else showExamples();
}

function markFilters() {
  for (const choice of $("facets").querySelectorAll("select")) {
    choice.value = filters[choice.name] ?? "";
    choice.parentElement.classList.toggle("set", Boolean(choice.value));
  }
  const set = about.facets.filter((facet) => filters[facet.column]);
  $("filters-set").textContent = set.map((facet) => `${facet.name.replaceAll("_", " ")}: ${filters[facet.column]}`).join(", ");
  $("unfilter").hidden = !set.length;
}

// -- results

function showResults() {
  const found = answer.results, count = found.length;
  const near = query.item ? `like ${nameOf(query.item)}` : [query.file && "like your photo", query.text && `for “${query.text}”`]
    .filter(Boolean).join(" and ");
  $("found-title").textContent = count ? `${count} ${count === 1 ? "item" : "items"} ${near}` : `Nothing ${near} passes the filters`;
  $("compared").textContent = count ? comparedText(found[0]) : "";
  $("results").replaceChildren(...found.map(card));
  $("more").hidden = count < wanted || wanted >= MOST;
  $("found").hidden = false;
  $("status").textContent = $("found-title").textContent;
}

function comparedText(first) {
  const other = query.item ? "the item you search with" :
    `the best match, ${nameOf(first)}, since of ${query.file ? "your photo only its pixels are" : "your words no attributes are"} known`;
  return `Each item is compared with ${other}. The model sees pixels, not attributes: they are for you to check.`;
}

function card(result, place) {
  const made = $("card").content.firstElementChild.cloneNode(true);
  const compare = made.querySelector(".compare"), name = nameOf(result);
  made.prepend(photoButton(result));
  made.querySelector("h3 bdi").textContent = name;
  made.querySelector(".place").replaceChildren(`${place + 1}. `, isolated(result.title ? result.label ?? "" : ""));
  made.querySelector(".score b").textContent = result.score.toFixed(3);
  made.querySelector(".meter i").style.setProperty("--share", `${Math.max(0, Math.min(1, result.score)) * 100}%`);
  made.querySelector(".margin").textContent = marginText(result.margin);
  made.querySelector(".why").replaceChildren(...whyLines(result));
  compare.ariaLabel = `Compare with ${name}`;
  compare.addEventListener("click", () => openComparison(result));
  return made;
}

function marginText(margin) {
  if (margin === null) return "the last one";
  const size = Math.abs(margin) < 0.0005 ? "<0.001" : Math.abs(margin).toFixed(3);
  return margin >= 0 ? `${size} ahead of the next` : `${size} behind the next, but it has the words`;
}

function whyLines({why}) {
  const lines = [];
  const line = (kind, parts) => {
    const shown = parts.slice(0, SHOWN).flatMap((one, n) => n ? [", ", ...one] : one);
    const rest = parts.length - SHOWN;
    lines.push(part("li", {className: kind}, ...shown, rest > 0 ? ` and ${rest} more` : ""));
  };
  const named = (name) => `${name.replaceAll("_", " ")} `;
  const different = Object.entries(why.different), same = Object.entries(why.same);
  if (why.words.length) line("words", why.words.map((word) => [isolated(word)]));
  if (different.length) line("different", different.map(([name, {here, there}]) => [named(name), isolated(here), ", not ", isolated(there)]));
  if (same.length) line("same", same.map(([name, value]) => [named(name), isolated(value)]));
  if (why.compared_with === null) lines.push(part("li", {className: "best", textContent: "the best match"}));
  return lines;
}

// -- two photos side by side

let compared = null;

function openComparison(result) {
  compared = result;
  const first = answer.results[0], other = query.item ?? (result === first ? null : first);
  $("compare-title").textContent = nameOf(result);
  const sides = [figure(nameOf(result), `${result.photo}?side=800`, `items/${encodeURIComponent(result.item_id)}/attention`)];
  if (query.item) sides.unshift(figure(`Searched with: ${nameOf(query.item)}`, `${query.item.photo}?side=800`, `items/${encodeURIComponent(query.item.item_id)}/attention`));
  else if (query.file) sides.unshift(figure("Your photo", addressOf(query.file), answer.attention));
  else sides.unshift(part("p", {className: "quote"}, isolated(query.text)));
  $("sides").replaceChildren(...sides);
  $("looked").hidden = !about.attention;
  $("even").hidden = false;
  $("compare-note").textContent = !other ? "The best match: the others are compared with it." : query.item ? "" :
    `Attributes beside those of the best match, ${nameOf(other)}.`;
  showAttributes(result, other);
  $("compare").showModal();
  $("compare").scrollTop = 0;
}

function figure(name, address, attention) {
  const image = part("img", {alt: name}), frame = part("div", {className: "photo"}, image);
  if (address.startsWith("blob:")) image.src = address;
  else show(image, address);
  if (about.attention && attention) addHeat(frame, attention);
  return part("figure", {}, frame, part("figcaption", {}, isolated(name)));
}

async function addHeat(frame, attention) {
  try {
    const {heat, weights} = await (typeof attention === "string" ? askJson(attention) : attention);
    if (!frame.isConnected) return; // another item is compared by now
    frame.append(part("img", {className: "heat", alt: "", src: heat}));
    if (Math.max(...weights) * weights.length > NEARLY_EVEN) $("even").hidden = true;
    showHeat();
  } catch (error) {
    $("compare-note").textContent = error instanceof Refused ? error.message : "";
  }
}

function showHeat() {
  for (const heat of $("sides").querySelectorAll(".heat")) {
    heat.hidden = !$("heat").checked;
    heat.parentElement.classList.toggle("heated", $("heat").checked);
  }
}

function showAttributes(result, other) {
  const own = result.attributes, its = other?.attributes ?? {};
  const names = [...new Set([...Object.keys(own), ...Object.keys(its)])];
  const rank = (name) => own[name] === undefined || its[name] === undefined ? 2 : own[name] !== its[name] ? 0 : 1;
  if (other) names.sort((a, b) => rank(a) - rank(b));
  const cell = (value) => part("td", {}, value === undefined ? "–" : isolated(value));
  const rows = names.map((name) => part("tr", {className: other ? ["different", "same", ""][rank(name)] : ""},
    part("th", {scope: "row", textContent: name.replaceAll("_", " ")}), cell(own[name]), ...(other ? [cell(its[name])] : [])));
  const heads = ["Attribute", "This item", ...(other ? [query.item ? "Searched with" : "Best match"] : [])];
  $("attributes").replaceChildren(
    part("thead", {}, part("tr", {}, ...heads.map((name) => part("th", {scope: "col", textContent: name})))),
    part("tbody", {}, ...rows));
  $("attributes").hidden = !names.length;
}

// -- what a person does

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!await ready) return;
  const given = words();
  if (query.file) return start({...given, file: query.file});
  if (given.text && about.texts) return start(given);
  fail(new Refused(about.texts ? "Type some words or choose a photo first." :
    "This model sees photos only: choose a photo first; the words then choose among what is like it."));
});
$("file").addEventListener("change", () => { takePhoto($("file").files[0]); $("file").value = ""; });
$("clear").addEventListener("click", () => { start(query.file ? words() : {}); $("file").focus(); });
$("unfilter").addEventListener("click", () => { filters = {}; filtered(); });
$("more").addEventListener("click", async () => {
  const before = answer.results.length;
  wanted = Math.min(MOST, wanted + PAGE);
  await search();
  $("results").children[before]?.querySelector("button").focus();
});
$("heat").addEventListener("change", showHeat);
$("search-on").addEventListener("click", () => start({item: compared}));
$("compare").addEventListener("click", (event) => { if (event.target === $("compare")) $("compare").close(); });
$("preview").addEventListener("error", () => { $("preview").hidden = true; });

const carriesFile = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => {
  if (!carriesFile(event)) return;
  event.preventDefault();
  $("drop").classList.add("over");
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
addEventListener("drop", (event) => {
  if (!carriesFile(event)) return;
  event.preventDefault();
  $("drop").classList.remove("over");
  takePhoto(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => takePhoto([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
addEventListener("popstate", (event) => {
  const before = asked[event.state?.number];
  filters = {...before?.filters ?? {}};
  markFilters();
  start(before?.query ?? {}, {push: false});
});

async function open() {
  about = await askJson("about");
  const exact = about.recall_at_10 === null ? "" : `; approximate search finds ${(about.recall_at_10 * 100).toFixed(1)} % of the exact ten`;
  $("about").replaceChildren(`${about.items.toLocaleString("en")} items, model `, isolated(about.model), exact);
  $("or-words").hidden = !about.texts;
  $("hybrid-row").hidden = !about.texts;
  $("text-label").textContent = about.texts ? "Words" : "Words beside the photo";
  $("text-note").hidden = about.texts;
  $("text-note").textContent = about.texts ? "" : "This model sees photos only; words are looked for in titles and attributes.";
  showFilters();
  markFilters();
  const id = new URLSearchParams(location.search).get("item");
  if (id) {
    query = {item: (await askJson(`items?ids=${encodeURIComponent(id)}`)).items[0]};
  }
  asked.push({query, filters: {}});
  history.replaceState({number: 0}, "");
  const typed = $("text").value;  // somebody may have been quicker
  start(query, {push: false});
  $("text").value = typed;
}
const ready = open().then(() => true, (error) => {
  fail(error);
  return false;
});
