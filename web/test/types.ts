// What users of the types write, checked and never run.
import { connect, jobState, submitJob, Problem, type JobProgress } from "../public/barnabas/barnabas.js";

const connection = connect({ url: "http://127.0.0.1:8080", transports: ["sse"] });
const subscription = connection.subscribe("c", { since: "-15m" }, (event) => console.log(event.type, event.data), (gap) => gap.reason);
const token: string | undefined = subscription.token;
connection.use();
const { id } = await submitJob("import-contacts", "name\n", { channel: "c" });
const progress: JobProgress = await jobState(id, { waitS: 5 });
try {
  console.log(token, progress.rows.ok);
} catch (error) {
  if (error instanceof Problem) console.log(error.line);
}
