// Shows the three tables as they are told, and measures how long a change takes through them.

/** @type {Map<string, Map<string, Record<string, unknown>>>} */
const stores = new Map([
  ["countries", new Map()],
  ["time-zones", new Map()],
  ["events", new Map()],
]);

/** What a row says beside its key. */
const columns = {
  countries: (row) => [row.name, row.zone],
  "time-zones": (row) => [row.country, row.utc_offset],
  events: (row) => [row.title, row.begins_utc],
};

/** @type {{ key: string, begin: number } | undefined} */
let waiting;

const took = document.getElementById("took");

/** @param {string} store @param {string} [changed] */
function show(store, changed) {
  const rows = [...stores.get(store)].sort(([a], [b]) => (a < b ? -1 : 1));
  const table = document.querySelector(`[data-store="${store}"] table`);
  table.replaceChildren(
    ...rows.map(([key, row]) => {
      const line = document.createElement("tr");
      line.classList.toggle("changed", key === changed);
      line.append(
        ...[key, ...columns[store](row)].map((text) => {
          const cell = document.createElement("td");
          cell.textContent = String(text);
          return cell;
        }),
      );
      return line;
    }),
  );
}

new EventSource("/stores").addEventListener("message", ({ data }) => {
  const { store, all, key, value } = JSON.parse(data);
  if (all) {
    stores.set(store, new Map(Object.entries(all)));
  } else if (value) {
    stores.get(store).set(key, value);
  } else {
    stores.get(store).delete(key);
  }
  show(store, key);
  if (store === "events" && key === waiting?.key) {
    took.textContent = `It was in Events after ${Math.round(performance.now() - waiting.begin)} ms.`;
    waiting = undefined;
  }
});

/** @param {string} key @param {unknown} [country] */
async function change(key, country) {
  waiting = { key, begin: performance.now() };
  took.textContent = "";
  const method = country ? "PUT" : "DELETE";
  const answer = await fetch(`/countries/${key}`, { method, body: country && JSON.stringify(country) });
  if (!answer.ok) {
    took.textContent = `It was refused: ${answer.status}.`;
  }
}

const on = (id, act) => document.getElementById(id).addEventListener("click", act);
on("add", () => change("SS", { name: "South Sudan", zone: "Africa/Juba", utc_offset_minutes: 120 }));
on("delete", () => change("SS"));
on("clocks", () => {
  const germany = stores.get("countries").get("DE");
  if (germany) {
    change("DE", { ...germany, utc_offset_minutes: germany.utc_offset_minutes === 60 ? 120 : 60 });
  }
});
